"""A `Run` in each framework, with the features that the framework has."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import torch
from torch import nn

import karikomi as kk
from contract.pairs import MASKS, WEIGHTS, Run
from contract.reference_run import Arrays, Trace
from karikomi.errors import NonFinite
from karikomi.keras.optimizers.masking_optimizer import MaskedOptimizer
from karikomi.torch.numerics import norms

Driver = Callable[[Run], Trace]
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options with which XLA compiles in half of the time."""


class _Torch:
    """A module, its optimizers, a handle and a scaler."""

    def __init__(self, run: Run, *, fused: bool) -> None:
        self.run = run
        self.model = nn.ModuleDict(
            {"one": nn.Linear(3, 2, bias=False), "two": nn.Linear(2, 1, bias=False)}
        )
        for name, parameter in self.model.named_parameters():
            parameter.data = torch.tensor(WEIGHTS[name], dtype=torch.float32)
        groups = [[p] for p in self.model.parameters()] if run.apart else [self.model.parameters()]
        self.optimizers = [
            torch.optim.SGD(group, lr=run.rate, momentum=run.momentum, fused=fused)
            for group in groups
        ]
        masks = {name: torch.from_numpy(mask) for name, mask in MASKS.items()}
        self.handle = kk.torch.attach(
            self.optimizers,
            self.model,
            clip=run.rule,
            bound=None if run.bound is None else kk.bound.Clamp(run.bound),
            prune=kk.torch.Masks(masks) if run.masks else None,
            nonfinite=run.policy,
        )
        self.scaler = torch.amp.GradScaler(
            "cpu", enabled=run.scale is not None, init_scale=run.scale or 1.0
        )

    def backward(self, batch: int) -> None:
        slopes = self.run.slopes(batch)
        loss = torch.zeros(())
        for name, parameter in self.model.named_parameters():
            loss = loss + (parameter * torch.tensor(slopes[name], dtype=torch.float32)).sum()
        if self.run.penalty is not None:
            loss = loss + kk.torch.penalty(self.model, kk.prune.L1(self.run.penalty))
        self.scaler.scale(loss / self.run.every).backward()

    def step(self) -> None:
        try:
            if self.run.scale is not None and len(self.optimizers) > 1:
                for optimizer in self.optimizers:
                    self.scaler.unscale_(optimizer)
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            self.scaler.update() if self.run.scale is not None else None
        finally:
            self.model.zero_grad()

    def parts(self) -> list[Any]:
        return [self.model, *self.optimizers, self.handle, self.scaler]

    def weights(self) -> Arrays:
        return {n: p.detach().numpy().astype(np.float64) for n, p in self.model.named_parameters()}


def _torch(run: Run, *, fused: bool) -> Trace:
    trace, own = Trace(), _Torch(run, fused=fused)
    for batch in range(run.batches):
        own.backward(batch)
        if (batch + 1) % run.every:
            continue
        try:
            own.step()
        except NonFinite:
            trace.raised += 1
        _note(trace, own.weights())
        # Gradients that wait for their update are in no state of torch.
        if run.stop is not None and run.stop <= batch + 1 < run.stop + run.every:
            stream, fresh = io.BytesIO(), _Torch(run, fused=fused)
            torch.save([part.state_dict() for part in own.parts()], stream)
            stream.seek(0)
            saved = torch.load(stream, weights_only=False)
            for part, state in zip(fresh.parts(), saved, strict=True):
                part.load_state_dict(state)
            own = fresh
    return trace


def in_torch(run: Run) -> Trace:
    """Decide on the host."""
    return _torch(run, fused=False)


def in_torch_on_a_device(run: Run) -> Trace:
    """Decide without the host, where the features of the run allow it, as on an accelerator."""
    with mock.patch.object(norms, "on_cpu", lambda tensor: False):
        return _torch(run, fused=True)


class _Keras:
    """Variables and the optimizers around them."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.variables = [
            keras.Variable(array.astype("float32"), name=name) for name, array in WEIGHTS.items()
        ]
        self.inner = keras.optimizers.SGD(
            run.rate,
            momentum=run.momentum,
            gradient_accumulation_steps=run.every if run.every > 1 else None,
            loss_scale_factor=run.scale,
        )
        bound = None if run.bound is None else kk.bound.Clamp(run.bound)
        self.clipped = kk.keras.clipped(self.inner, run.rule, bound=bound, nonfinite=run.policy)
        self.optimizer: Any = self.clipped
        if run.masks:
            self.optimizer = MaskedOptimizer(self.clipped, places=[0, 1])
        self.optimizer.build(self.variables)
        if run.masks:
            self.optimizer.hold(dict(enumerate(MASKS.values())))

    def step(self, batch: int) -> None:
        slopes, tensors = self.run.slopes(batch), [v.value for v in self.variables]
        loss = torch.zeros(())
        for tensor, slope in zip(tensors, slopes.values(), strict=True):
            loss = loss + (tensor * torch.tensor(slope, dtype=torch.float32)).sum()
            if self.run.penalty is not None:
                loss = loss + kk.keras.Penalty(kk.prune.L1(self.run.penalty))(tensor)
        grads = torch.autograd.grad(self.optimizer.scale_loss(loss), tensors)
        self.optimizer.apply(list(grads), self.variables)

    def weights(self) -> Arrays:
        return {v.name: v.numpy().astype(np.float64) for v in self.variables}

    def moved(self) -> _Keras:
        fresh = _Keras(self.run)
        for old, new in zip(self.variables, fresh.variables, strict=True):
            new.assign(old.numpy())
        for old, new in ((self.inner, fresh.inner), (self.clipped, fresh.clipped)):
            store: dict[str, Any] = {}
            old.save_own_variables(store)
            new.load_own_variables(store)
        if self.run.masks:
            store = {}
            self.optimizer.save_own_variables(store)
            fresh.optimizer.load_own_variables(store)
        return fresh


def in_keras(run: Run) -> Trace:
    """Apply an optimizer of Keras on torch."""
    trace, own = Trace(), _Keras(run)
    for batch in range(run.batches):
        try:
            own.step(batch)
        except NonFinite:
            trace.raised += 1
        if (batch + 1) % run.every == 0:
            _note(trace, own.weights())
        if batch + 1 == run.stop:
            own = own.moved()
    return trace


def in_jax(run: Run) -> Trace:
    """Apply a compiled optimizer of optax."""
    trace = Trace()
    masks = MASKS if run.masks else {}
    tx = kk.jax.clipped(optax.sgd(run.rate, run.momentum or None), run.rule, nonfinite=run.policy)
    if run.every > 1:
        tx = optax.MultiSteps(tx, run.every)  # type: ignore[assignment]
    # Compiled code cannot raise.
    update = tx.update if run.policy == "raise" else jax.jit(tx.update, compiler_options=QUICKLY)
    pull = jax.jit(
        jax.grad(lambda p: kk.jax.penalty(p, kk.prune.L1(run.penalty or 0.0))),
        compiler_options=QUICKLY,
    )
    params = kk.jax.masked({n: jnp.asarray(a, jnp.float32) for n, a in WEIGHTS.items()}, masks)
    state: Any = tx.init(params)
    for batch in range(run.batches):
        grads = {n: jnp.asarray(a, jnp.float32) for n, a in run.slopes(batch).items()}
        if run.penalty is not None:
            grads = jax.tree.map(jnp.add, grads, pull(params))
        try:
            updates, state = update(kk.jax.masked(grads, masks), state, params)
            params = kk.jax.masked(optax.apply_updates(params, updates), masks)
        except NonFinite:
            trace.raised += 1
        if run.bound is not None and (batch + 1) % run.every == 0:
            params = kk.jax.project(params, kk.bound.Clamp(run.bound))[0]
        if (batch + 1) % run.every == 0:
            _note(trace, {name: np.asarray(a, np.float64) for name, a in params.items()})
        if batch + 1 == run.stop:
            leaves, form = jax.tree.flatten((params, state))
            stream = io.BytesIO()
            np.savez(stream, *map(np.asarray, leaves))
            stream.seek(0)
            with np.load(stream) as file:
                read = [jnp.asarray(file[name]) for name in file.files]
            params, state = jax.tree.unflatten(form, read)
    return trace


def in_numpy(run: Run) -> Trace:
    """Call the functions of `karikomi.numpy` in a loop, which keeps the momentum."""
    trace, state, still = Trace(), None, {n: np.zeros_like(a) for n, a in WEIGHTS.items()}
    masks = MASKS if run.masks else {}
    weights, speed = kk.numpy.masked(dict(WEIGHTS), masks), still
    for batch in range(run.batches):
        grads = run.slopes(batch)
        if run.penalty is not None:
            pull = kk.numpy.penalty(weights, kk.prune.L1(run.penalty))[1]
            grads = {name: grads[name] + pull[name] for name in grads}
        try:
            clipped, outcome, state = kk.numpy.clip(
                kk.numpy.masked(grads, masks), run.rule, state, nonfinite=run.policy
            )
            if not outcome.skipped:
                speed = {name: run.momentum * speed[name] + clipped[name] for name in speed}
                weights = {name: weights[name] - run.rate * speed[name] for name in weights}
        except NonFinite:
            trace.raised += 1
        if run.bound is not None:
            weights = kk.numpy.bound(weights, kk.bound.Clamp(run.bound))[0]
        _note(trace, weights)
        if batch + 1 == run.stop:
            state = {key: np.asarray(value).tolist() for key, value in state.items()}
    return trace


def _note(trace: Trace, weights: Arrays) -> None:
    trace.weights.append({name: np.array(array) for name, array in weights.items()})


DRIVERS: dict[str, Driver] = {
    "torch": in_torch,
    "torch on a device": in_torch_on_a_device,
    "keras": in_keras,
    "jax": in_jax,
    "numpy": in_numpy,
}
