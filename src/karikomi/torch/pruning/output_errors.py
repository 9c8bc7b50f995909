"""Relative errors that masks cause in the outputs of a module and of each of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn

from karikomi.prune.account import error_ratio
from karikomi.torch.modules.parameters import unwrapped
from karikomi.torch.modules.prunable import PRUNED, owner
from karikomi.torch.pruning.masks import Masks
from karikomi.torch.tracing.batches import Batch, batches_of
from karikomi.torch.tracing.eval_mode import steady

BATCHES = 4
"""How many batches the errors are measured on."""


@torch.no_grad()
def output_errors(module: nn.Module, masks: Masks, data: Iterable[Any]) -> dict[str, float]:
    """Return parameter name -> ``|f(x) - f'(x)| / |f(x)|`` of its layer, and "" -> that of the module.

    f is the layer with its unmasked weight and f' with its masked weight, for the inputs x that it has in
    the unmasked module for the first batches of `data`; norms are over all outputs. Modes are restored.
    """
    plain = unwrapped(module)
    batches = first_of(plain, data)
    sums: dict[str, list[float]] = {}
    hooks = [
        owner(plain, name).register_forward_hook(_hook(name, mask, sums), with_kwargs=True)
        for name, mask in masks.items()
        if isinstance(owner(plain, name), PRUNED) and name.rpartition(".")[2] == "weight"
    ]
    try:
        before = outputs_of(plain, batches)
    finally:
        for hook in hooks:
            hook.remove()
    parameters = dict(plain.named_parameters())
    masked = {n: parameters[n] * mask.to(parameters[n].device) for n, mask in masks.items()}
    after = outputs_of(plain, batches, masked)
    errors = {name: error_ratio(*pair) for name, pair in sums.items()}
    whole = relative_error(before, after)
    return errors if whole is None else errors | {"": whole}


def first_of(module: nn.Module, data: Iterable[Any]) -> list[Batch]:
    """Return the first batches: read once, as data may be shuffled anew each time."""
    return list(islice(batches_of(data, module, where="data"), BATCHES))


@torch.no_grad()
def outputs_of(
    module: nn.Module, batches: Iterable[Batch], weights: Mapping[str, torch.Tensor] | None = None
) -> list[Any]:
    """Return the outputs of a module for these batches in eval mode, with other weights if they are given."""
    module = unwrapped(module)
    with steady(module):
        return [
            torch.func.functional_call(
                module, dict(weights or {}), batch.positional, dict(batch.named)
            )
            for batch in batches
        ]


def relative_error(before: Iterable[Any], after: Iterable[Any]) -> float | None:
    """Return the relative L2 distance of outputs over all their tensors, ``None`` if they have no tensors."""
    pairs = [_squares(*outputs) for outputs in zip(before, after, strict=True)]
    known = [pair for pair in pairs if pair is not None]
    if not known or len(known) < len(pairs):
        return None
    return error_ratio(sum(pair[0] for pair in known), sum(pair[1] for pair in known))


def _hook(name: str, mask: torch.Tensor, sums: dict[str, list[float]]) -> Callable[..., None]:
    leaf, is_nested = name.rpartition(".")[2], False

    def compare(
        layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        nonlocal is_nested
        if is_nested or not isinstance(output, torch.Tensor):
            return
        weight = layer.get_parameter(leaf)
        is_nested = True
        try:
            kept = {leaf: weight * mask.to(weight.device)}
            masked = torch.func.functional_call(layer, kept, args, named)
        finally:
            is_nested = False
        total = sums.setdefault(name, [0.0, 0.0])
        difference, whole = _squares(output, masked) or (0.0, 0.0)
        total[0] += difference
        total[1] += whole

    return compare


def _squares(before: Any, after: Any) -> tuple[float, float] | None:
    """Return ``(|f - f'|^2, |f|^2)`` over all tensors of an output, ``None`` without tensors of equal shapes."""
    first, second = list(_tensors(before)), list(_tensors(after))
    if not first or [a.shape for a in first] != [b.shape for b in second]:
        return None
    pairs = zip(first, second, strict=True)
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return difference, sum(float(a.double().square().sum()) for a in first)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Yield the floating tensors of an output, also of nested tuples, lists and dicts."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping | list | tuple):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(item)
