"""How far masks move the outputs of a module: of each layer for the inputs it has now, and at the end.

Streaming: no more than one layer's outputs are kept beside a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from niwaki.torch.masks import Masks
from niwaki.torch.prunable import PRUNED, owner
from niwaki.torch.tensors import unwrapped


@torch.no_grad()
def output_errors(module: nn.Module, masks: Masks, data: Iterable[Any]) -> dict[str, float]:
    """Return parameter name -> ``|f(x) - f'(x)| / |f(x)|`` of its layer, and "" -> that of the module.

    f is the layer with its weight as it is and f' with its weight masked, for the inputs x that `data`
    gives it in the module as it is; norms are over all outputs. Modes are restored.
    """
    plain = unwrapped(module)
    sums: dict[str, list[float]] = {}
    hooks = [
        owner(plain, name).register_forward_hook(_hook(name, mask, sums))
        for name, mask in masks.items()
        if isinstance(owner(plain, name), PRUNED) and name.rpartition(".")[2] == "weight"
    ]
    training = {one: one.training for one in plain.modules()}
    plain.eval()
    batches, before = [], []
    try:
        for batch in data:
            inputs = inputs_of(batch)
            batches.append(inputs)
            before.append(plain(*inputs))
            if len(before) == BATCHES:
                break
    finally:
        for hook in hooks:
            hook.remove()
    try:
        weights = _masked(plain, masks)
        after = [torch.func.functional_call(plain, weights, inputs) for inputs in batches]
    finally:
        for one, mode in training.items():
            one.training = mode
    errors = {name: _ratio(*pair) for name, pair in sums.items()}
    pairs = [_pair(one, other) for one, other in zip(before, after, strict=True)]
    if pairs and None not in pairs:
        errors[""] = _ratio(sum(p[0] for p in pairs if p), sum(p[1] for p in pairs if p))
    return errors


BATCHES = 4
"""How many batches the errors are measured on."""


def inputs_of(batch: Any) -> tuple[Any, ...]:
    """Return what a batch gives the module: of ``(inputs, targets)`` the inputs."""
    first = batch[0] if isinstance(batch, tuple | list) else batch
    return tuple(first) if isinstance(first, tuple | list) else (first,)


def _hook(name: str, mask: torch.Tensor, sums: dict[str, list[float]]) -> Callable[..., None]:
    def compare(layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        weight = layer.weight * mask.to(layer.weight.device)
        forward = type(layer).forward
        kept = layer.weight
        del layer._parameters["weight"]
        layer.weight = weight  # type: ignore[assignment]
        try:
            other = forward(layer, *inputs)
        finally:
            del layer.weight
            layer._parameters["weight"] = kept  # type: ignore[assignment]
        total = sums.setdefault(name, [0.0, 0.0])
        total[0] += float((output.double() - other.double()).square().sum())
        total[1] += float(output.double().square().sum())

    return compare


def _masked(module: nn.Module, masks: Masks) -> Mapping[str, torch.Tensor]:
    parameters = dict(module.named_parameters())
    return {
        name: parameters[name] * mask.to(parameters[name].device) for name, mask in masks.items()
    }


def _pair(one: Any, other: Any) -> tuple[float, float] | None:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return None
    return float((one.double() - other.double()).square().sum()), float(one.double().square().sum())


def _ratio(difference: float, whole: float) -> float:
    if whole == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return math.sqrt(difference / whole)
