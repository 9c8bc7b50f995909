"""How each framework is driven: the same tensors in, the same tensors out, whatever holds them.

A new framework joins every law with one function `Apply` here, in `FRAMEWORKS`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

import niwaki as nw
from contract.rows import Row

Tensors = Mapping[str, np.ndarray | None]

# Names, shapes and unit axes of the tensors that the laws speak of: what `Network` has.
SHAPES = {
    "gain": (),
    "linear.weight": (4, 3),
    "linear.bias": (4,),
    "up.weight": (2, 3, 2),
    "grid.weight": (2, 1, 2, 2),
}
UNIT_AXES = {"linear.weight": 0, "up.weight": 1, "grid.weight": 0}


class Apply(Protocol):
    """Apply a row's rule to tensors (gradients for a clip, weights for a bound)."""

    def __call__(
        self, row: Row, tensors: Tensors, state: Any = None, **options: Any
    ) -> tuple[dict[str, np.ndarray | None], nw.Outcome, Any]: ...


class Network(nn.Module):
    """A module with one parameter of each of `SHAPES`; `inputs` of 0 makes an empty weight."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))
        self.linear = nn.Linear(3, 4)
        self.up = nn.ConvTranspose1d(2, 3, 2, bias=False)
        self.grid = nn.Conv2d(1, 2, 2, bias=False)


def network(tensors: Tensors, *, gradients: bool) -> Network:
    """Return a `Network` whose gradients (or weights) are copies of these tensors."""
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


def begun(apply: Apply) -> Apply:
    """Let a driver start where the row says, unless it is given a state."""

    @functools.wraps(apply)
    def driven(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
        return apply(row, tensors, row.start() if state is None else state, **options)

    return driven


def _gradients(parameters: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray | None]:
    return {n: None if p.grad is None else p.grad.numpy() for n, p in parameters.items()}


@begun
def numpy(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
    if row.kind == "clip":
        return nw.numpy.clip(tensors, row.rule, state, **options)  # type: ignore[type-var]
    return nw.numpy.bound(tensors, row.rule, state, unit_axes=UNIT_AXES, **options)  # type: ignore[type-var]


@begun
def torch_module(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
    model = network(tensors, gradients=row.kind == "clip")
    if row.kind == "clip":
        outcome, state = nw.torch.clip_(model, row.rule, state, **options)
        return _gradients(dict(model.named_parameters())), outcome, state
    outcome, state = nw.torch.bound_(model, row.rule, state, **options)
    return {n: p.detach().numpy() for n, p in model.named_parameters()}, outcome, state


@begun
def torch_parameters(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
    parameters = dict(network(tensors, gradients=True).named_parameters())
    pairs = iter(parameters.items())
    outcome, state = nw.torch.clip_(pairs, row.rule, state, **options)
    return _gradients(parameters), outcome, state


@begun
def torch_attach(row: Row, tensors: Tensors, state: Any = None, **options: Any) -> Any:
    """One step of an optimizer that moves nothing, so that what `attach` made of it can be read."""
    model = network(tensors, gradients=row.kind == "clip")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = nw.torch.attach(optimizer, model, **{row.kind: row.rule}, **options)
    if state is not None:
        parts = {"clip": None, "bound": None, row.kind: state}
        handle.load_state_dict({"steps": state["attempted"], "masks": None, **parts})
    optimizer.step()
    after = handle.state_dict()[row.kind]
    if row.kind == "clip":
        return _gradients(dict(model.named_parameters())), handle.last, after
    return {n: p.detach().numpy() for n, p in model.named_parameters()}, handle.last_bound, after


FRAMEWORKS: dict[str, Apply] = {
    "numpy": numpy,
    "torch_module": torch_module,
    "torch_parameters": torch_parameters,
    "torch_attach": torch_attach,
}
ONLY_CLIPS = {"torch_parameters"}  # bare parameters have no layers, so no bound acts on them
DROPS_GRADIENTS = {
    "torch_module",
    "torch_parameters",
    "torch_attach",
}  # a skipped step leaves None, not zeros
