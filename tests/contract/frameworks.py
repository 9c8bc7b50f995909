"""How each framework is driven: the same tensors in, the same tensors out, whatever holds them.

A new framework joins every law with one function `Apply` here, in `FRAMEWORKS`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

import karikomi as kk
from contract.bound_rows import FAN_IN
from contract.namespaces import load_quietly
from contract.row import Row
from depth import FULL
from karikomi.functional.bounding import plan_bound
from karikomi.functional.unit_axes import plan_for
from karikomi.rules.checkpoint import from_plain, to_plain
from karikomi.rules.decide import COUNTERS, PREFIX, leaves

Tensors = Mapping[str, np.ndarray | None]

# Names, shapes and unit axes of the tensors that the laws speak of: what `Network` has.
SHAPES = {
    "gain": (),
    "linear.weight": (4, 3),
    "linear.bias": (4,),
    "up.weight": (2, 3, 2),
    "grid.weight": (2, 1, 2, 2),
}
# The root conftest runs the laws of one compiled rule together: few are needed at a time, and each holds memory.
COMPILED_AT_ONCE = 8
UNIT_AXES = {"linear.weight": 0, "up.weight": 1, "grid.weight": 0}


class Apply(Protocol):
    """Apply a row's rule to tensors (gradients or updates for a clip, weights for a bound)."""

    def __call__(
        self, row: Row, tensors: Tensors, state: Any = None, **options: Any
    ) -> tuple[dict[str, np.ndarray | None], kk.Outcome, Any]: ...


class Network(nn.Module):
    """A module with one parameter of each of `SHAPES`; `inputs` of 0 makes an empty weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))
        self.linear = nn.Linear(3, 4)
        self.up = nn.ConvTranspose1d(2, 3, 2, bias=False)
        self.grid = nn.Conv2d(1, 2, 2, bias=False)


def network(tensors: Tensors, *, gradients: bool) -> Network:
    """Return a `Network` whose gradients (or weights) are copies of these tensors.

    Beside a gradient every weight is 1.
    """
    model = Network()
    for name, parameter in model.named_parameters():
        array = tensors[name]
        if array is None:
            continue
        parameter.data = torch.from_numpy(np.array(array))
        if gradients:
            parameter.grad = parameter.data
            parameter.data = torch.ones_like(parameter.grad)
    return model


def idle(row: Row, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return an optimizer that moves nothing, with the row's second moments if it has some."""
    if row.moments is None:
        return torch.optim.SGD(parameters, lr=0.0)
    kept = list(parameters)
    optimizer = torch.optim.Adam(kept, lr=0.0)
    for parameter in kept:
        zeros = torch.zeros(parameter.shape, dtype=parameter.dtype)
        moments = {"exp_avg": zeros, "exp_avg_sq": torch.full_like(zeros, row.moments)}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    return optimizer


def begun(apply: Apply) -> Apply:
    """Let a driver start where the row says, unless it is given a state."""

    @functools.wraps(apply)
    def driven(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
        return apply(row, tensors, row.start() if state is None else state, **options)

    return driven


def _gradients(parameters: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray | None]:
    return {n: None if p.grad is None else p.grad.numpy() for n, p in parameters.items()}


def _filled(tensors: Tensors, number: float) -> dict[str, np.ndarray]:
    arrays = {n: np.zeros(SHAPES[n]) if a is None else a for n, a in tensors.items()}
    return {name: np.full_like(array, number) for name, array in arrays.items()}


@begun
def numpy(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
    if row.kind == "bound":
        facts = {"unit_axes": UNIT_AXES, "fan_in": FAN_IN}
        return kk.numpy.bound(tensors, row.rule, state, **facts, **options)  # type: ignore[arg-type]
    facts = {"weights": _filled(tensors, 1.0), "unit_axes": UNIT_AXES}
    if row.moments is not None:
        facts["second_moments"] = _filled(tensors, row.moments)
    return kk.numpy.clip(tensors, row.rule, state, **facts, **options)  # type: ignore[arg-type]


@begun
def torch_module(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
    model = network(tensors, gradients=row.kind == "clip")
    if row.kind == "clip":
        options["optimizer"] = idle(row, model.parameters())
        outcome, state = kk.torch.clip_(model, row.rule, state, **options)
        return _gradients(dict(model.named_parameters())), outcome, state
    outcome, state = kk.torch.bound_(model, row.rule, state, **options)
    return {n: p.detach().numpy() for n, p in model.named_parameters()}, outcome, state


@begun
def torch_parameters(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
    parameters = dict(network(tensors, gradients=True).named_parameters())
    options["optimizer"] = idle(row, parameters.values())
    outcome, state = kk.torch.clip_(iter(parameters.items()), row.rule, state, **options)
    return _gradients(parameters), outcome, state


def _load(handle: Any, part: str, state: Any) -> None:
    if state is not None:
        parts = {"clip": None, "update": None, "bound": None, part: state}
        handle.load_state_dict({"steps": state["attempted"], "masks": None, **parts})


@begun
def torch_attach(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
    """One step of an optimizer that moves nothing, so that what `attach` made of it can be read."""
    model = network(tensors, gradients=row.kind == "clip")
    optimizer = idle(row, model.parameters())
    handle = kk.torch.attach(optimizer, model, **{row.kind: row.rule}, **options)
    _load(handle, row.kind, state)
    optimizer.step()
    after = handle.state_dict()[row.kind]
    if row.kind == "clip":
        return _gradients(dict(model.named_parameters())), handle.last, after
    return {n: p.detach().numpy() for n, p in model.named_parameters()}, handle.last_bound, after


@begun
def torch_updates(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
    """One step of SGD from weights of -0.0 (so that no bit is lost) whose update is the tensors."""
    model = network(tensors, gradients=True)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data.fill_(-0.0)
            parameter.grad.neg_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = kk.torch.attach(optimizer, model, update=row.rule, **options)
    _load(handle, "update", state)
    optimizer.step()
    moved = {n: None if p.grad is None else p.detach() for n, p in model.named_parameters()}
    after = {name: None if p is None else p.numpy() for name, p in moved.items()}
    return after, handle.last_update, handle.state_dict()["update"]


def _sorted_shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {n: SHAPES[n] if a is None else a.shape for n, a in sorted(tensors.items())}


@functools.lru_cache(COMPILED_AT_ONCE)
def _jax_transform(rule: Any, options: tuple[tuple[str, Any], ...], compiled: bool) -> Any:
    transform = kk.jax.clip(rule, unit_axes=UNIT_AXES, **dict(options))
    return transform, jax.jit(transform.update) if compiled else transform.update


def _jax_clip(row: Row, tensors: Tensors, state: Any, options: Any, *, compiled: bool) -> Any:
    transform, update = _jax_transform(row.rule, tuple(options.items()), compiled)
    shapes = _sorted_shapes(tensors)
    weights = {name: jnp.ones(shape) for name, shape in shapes.items()}
    axes = {name: (axis,) for name, axis in UNIT_AXES.items()}
    plan = plan_for(row.rule, shapes, axes)
    start = transform.init(weights)
    if state is not None:
        arrays = from_plain(plan, state)
        start = start._replace(
            rule={k: jnp.asarray(v, start.rule[k].dtype) for k, v in arrays.items()}
        )
    moments = jax.tree.map(lambda kept: jnp.full_like(kept, row.moments), start.moments)
    given = {name: None if a is None else jnp.asarray(a) for name, a in tensors.items()}
    done, after = update(given, start._replace(moments=moments), weights)
    if options.get("nonfinite") == "raise":
        kk.jax.check(after, stop_after=1)
    plain = to_plain(plan, {key: np.asarray(value) for key, value in after.rule.items()})
    arrays = {name: None if done[name] is None else np.asarray(done[name]) for name in tensors}
    return arrays, kk.jax.outcome(after), plain


def _jax_bound(row: Row, tensors: Tensors, state: Any) -> Any:
    kk.jax.bound(row.rule)
    given = {name: jnp.asarray(array) for name, array in sorted(tensors.items())}
    axes = {name: (axis,) for name, axis in UNIT_AXES.items()}
    stage = plan_bound(row.rule, _sorted_shapes(tensors), axes, FAN_IN, where="tests").stage
    start = None
    if state is not None:
        start = kk.jax.BoundState(
            {k: jnp.asarray(v) for k, v in from_plain([stage], state).items()}
        )
    done, outcome, after = kk.jax.project(
        given, row.rule, start, unit_axes=UNIT_AXES, fan_in=FAN_IN
    )
    plain = to_plain([stage], {key: np.asarray(value) for key, value in after.rule.items()})
    return {name: np.asarray(done[name]) for name in tensors}, outcome, plain


@begun
def jax_eager(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
    with jax.enable_x64(True):
        if row.kind == "bound":
            return _jax_bound(row, tensors, state)
        return _jax_clip(row, tensors, state, options, compiled=False)


@begun
def jax_jit(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
    with jax.enable_x64(True):
        return _jax_clip(row, tensors, state, options, compiled=True)


def _tensors(library: str) -> tuple[Any, Any]:
    """Return how an array becomes a tensor of TensorFlow or torch, and back."""
    if library == "torch":
        return torch.from_numpy, lambda tensor: tensor.detach().numpy()
    return load_quietly("tensorflow").constant, lambda tensor: tensor.numpy()


@functools.lru_cache(COMPILED_AT_ONCE)
def _keras_step(rule: Any, options: tuple[tuple[str, Any], ...], compiled: bool) -> Any:
    def step(grads: Any, state: Any, weights: Any) -> Any:
        done, _, after = kk.keras.clip(
            grads, rule, state, variables=weights, unit_axes=UNIT_AXES, **dict(options)
        )
        return done, after

    # As Keras has it, without AutoGraph, which rewrites every function once; tests/unit/test_keras_tape.py has both.
    return load_quietly("tensorflow").function(step, autograph=FULL) if compiled else step


def _keras_clip(
    row: Row, tensors: Tensors, state: Any, options: Any, library: str, compiled: bool = False
) -> Any:
    tensor, array = _tensors(library)
    shapes = _sorted_shapes(tensors)
    weights = {name: tensor(np.ones(shape)) for name, shape in shapes.items()}
    axes = {name: (axis,) for name, axis in UNIT_AXES.items()}
    start = kk.keras.initial_state(row.rule, weights, unit_axes=UNIT_AXES)
    plan = plan_for(row.rule, shapes, axes)
    if state is not None:
        kept = from_plain(plan, state)
        start |= {k: tensor(np.asarray(v, array(start[k]).dtype)) for k, v in kept.items()}
    for key in [key for key in start if key.startswith("moment.")]:
        start[key] = tensor(np.full(start[key].shape, row.moments, array(start[key]).dtype))
    given = {name: None if a is None else tensor(np.array(a)) for name, a in tensors.items()}
    done, after = _keras_step(row.rule, tuple(options.items()), compiled)(given, start, weights)
    if options.get("nonfinite") == "raise":
        kk.keras.check(after, stop_after=1)
    learned = {k: array(v) for k, v in after.items() if k in COUNTERS or k.startswith(PREFIX)}
    arrays = {name: None if done[name] is None else array(done[name]) for name in tensors}
    return arrays, kk.keras.outcome(after), to_plain(plan, learned)


@begun
def keras_torch(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
    return _keras_clip(row, tensors, state, options, "torch")


@begun
def tensorflow(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
    return _keras_clip(row, tensors, state, options, "tensorflow")


@begun
def tf_function(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
    return _keras_clip(row, tensors, state, options, "tensorflow", compiled=True)


FRAMEWORKS: dict[str, Apply] = {
    "keras on torch": keras_torch,
    "tensorflow": tensorflow,
    "tf.function": tf_function,
    "jax": jax_eager,
    "jax.jit": jax_jit,
    "numpy": numpy,
    "torch_module": torch_module,
    "torch_parameters": torch_parameters,
    "torch_attach": torch_attach,
    "torch_updates": torch_updates,
}
# XLA and TensorFlow take subnormal numbers for zero.
FLUSHING = [jax_eager, jax_jit, tensorflow, tf_function]
# A law that `make test` samples meets one of so many rules there: JAX compiles every operation that it runs by
# itself as well, TensorFlow looks for each one's kernel.
SLOW = {"jax": 10, "jax.jit": 10, "tf.function": 10, "tensorflow": 3}
EAGER = {"jax", "tensorflow"}
# A skipped step leaves None, not zeros.
DROPS_GRADIENTS = {"torch_module", "torch_parameters", "torch_attach"}


def serves(name: str, row: Row) -> bool:
    """Return whether a rule can be met in this framework at all."""
    if row.of_updates or name == "torch_updates":
        return row.of_updates and name in ("numpy", "torch_updates", "jax", "jax.jit")
    if name.startswith("jax") and (_skips(row) or not _functional(row)):
        return False
    if name in ("jax.jit", "keras on torch", "tensorflow", "tf.function") and row.kind == "bound":
        return False
    # Bare parameters have no layers, which say what a unit is; no bound acts on them either.
    return name != "torch_parameters" or (row.kind == "clip" and not row.by_unit)


def _skips(row: Row) -> bool:
    return any(getattr(leaf, "skips", False) for leaf in leaves(row.rule))


def _functional(row: Row) -> bool:
    """Return whether a rule's facts are measured in frameworks that never write in place."""
    return row.kind == "clip" or not {"spectral_norm", "largest_logit"} & set(row.rule.needs)
