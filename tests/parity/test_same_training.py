"""The same network, weights, batches and rule end in the same weights in every framework.

200 steps, with spikes and a NaN among them: within 1e-8 of plain NumPy with SGD in float64, and within
1e-3 with Adam in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import karikomi as kk
from depth import FULL, turns
from parity import small_network as small


def with_torch(case: str, kind: str, dtype: str) -> small.Weights:
    torch = pytest.importorskip("torch")
    rule, bound = small.CASES[case]
    model = torch.nn.Sequential()
    model.add_module("hidden", torch.nn.Linear(6, 8))
    model.add_module("tanh", torch.nn.Tanh())
    model.add_module("head", torch.nn.Linear(8, 3))
    model.to(getattr(torch, dtype))
    own = {n.replace("kernel", "weight"): a.T for n, a in small.weights(dtype).items()}
    model.load_state_dict({name: torch.tensor(array) for name, array in own.items()})
    rate = small.LEARNING_RATE[kind]
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=rate)
    if kind == "adam":
        optimizer = torch.optim.Adam(model.parameters(), rate, small.BETAS, small.EPSILON)
    kk.torch.attach(optimizer, model, clip=rule, bound=bound)
    for inputs, targets in small.batches(dtype):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(torch.tensor(inputs)), torch.tensor(targets))
        loss.backward()
        optimizer.step()
    state = model.state_dict().items()
    return {n.replace("weight", "kernel"): a.numpy().T for n, a in state}


def with_optax(case: str, kind: str, dtype: str) -> small.Weights:
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    jnp = jax.numpy
    rule, bound = small.CASES[case]
    inner = optax.sgd(small.LEARNING_RATE["sgd"])
    if kind == "adam":
        inner = optax.adam(small.LEARNING_RATE["adam"], *small.BETAS, small.EPSILON)
    with jax.enable_x64(dtype == "float64"):
        parts = [kk.jax.clipped(inner, rule, unit_axes=small.UNIT_AXES)]
        if bound is not None:
            axes = None if isinstance(bound, kk.bound.Clamp) else small.UNIT_AXES
            parts.append(kk.jax.bound(bound, unit_axes=axes))
        tx = optax.chain(*parts)

        def loss(params: Any, inputs: Any, targets: Any) -> Any:
            hidden = jnp.tanh(inputs @ params["hidden.kernel"] + params["hidden.bias"])
            return jnp.mean((hidden @ params["head.kernel"] + params["head.bias"] - targets) ** 2)

        @jax.jit
        def step(params: Any, state: Any, inputs: Any, targets: Any) -> Any:
            updates, state = tx.update(jax.grad(loss)(params, inputs, targets), state, params)
            return optax.apply_updates(params, updates), state

        params = {name: jnp.asarray(array) for name, array in small.weights(dtype).items()}
        state = tx.init(params)
        for inputs, targets in small.batches(dtype):
            params, state = step(params, state, inputs, targets)
        return {name: np.asarray(array) for name, array in params.items()}


def with_tape(case: str, kind: str, dtype: str) -> small.Weights:
    tf = pytest.importorskip("tensorflow")
    rule, bound = small.CASES[case]
    own = {n: tf.Variable(a, name=n.replace(".", "_")) for n, a in small.weights(dtype).items()}
    axes = {"*kernel": 1}

    @tf.function
    def step(inputs: Any, targets: Any, state: Any) -> Any:
        with tf.GradientTape() as tape:
            hidden = tf.tanh(inputs @ own["hidden.kernel"] + own["hidden.bias"])
            found = hidden @ own["head.kernel"] + own["head.bias"]
            loss = tf.reduce_mean(tf.square(found - targets))
        grads, _, state = kk.keras.clip(
            tape.gradient(loss, own), rule, state, variables=own, unit_axes=axes
        )
        for name, grad in grads.items():
            own[name].assign_sub(small.LEARNING_RATE["sgd"] * grad)
        return state

    state, kept = kk.keras.initial_state(rule, own, unit_axes=axes), None
    for inputs, targets in small.batches(dtype):
        state = step(tf.constant(inputs), tf.constant(targets), state)
        if bound is not None:
            arrays = {name: one.numpy() for name, one in own.items()}
            own_axes = {} if isinstance(bound, kk.bound.Clamp) else small.UNIT_AXES
            bounded, _, kept = kk.numpy.bound(arrays, bound, kept, unit_axes=own_axes)
            for name, array in bounded.items():
                own[name].assign(array)
    return {name: one.numpy() for name, one in own.items()}


IN_PROCESS: dict[str, tuple[Callable[[str, str, str], small.Weights], list]] = {
    "torch": (with_torch, list(small.SETTINGS)),
    "optax": (with_optax, list(small.SETTINGS)),
    "tf.function": (with_tape, [("sgd", "float64")]),
}
RUNS = [
    pytest.param(train, case, *setting, id=f"{name}-{case}-{setting[0]}")
    for name, (train, settings) in IN_PROCESS.items()
    for place, case in enumerate(small.CASES)
    if FULL or name == "torch" or place % 2 == (name == "optax")
    for setting in turns(settings, name, case)
]


@pytest.mark.parametrize(("train", "case", "kind", "dtype"), RUNS)
def test_ends_where_numpy_ends(
    train: Callable[[str, str, str], small.Weights], case: str, kind: str, dtype: str
) -> None:
    small.assert_close(train(case, kind, dtype), case, kind, dtype)
