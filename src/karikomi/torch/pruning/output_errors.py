"""How far masks move the outputs of a module: of each layer for the inputs it has now, and at the end.

Streaming: no more than one layer's outputs are kept beside a batch.
"""

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

    f is the layer with its weight as it is and f' with its weight masked, for the inputs x that the first
    batches of `data` give it in the module as it is; norms are over all outputs. Modes are restored.
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
    after = outputs_of(plain, batches, _masked(plain, masks))
    errors = {name: error_ratio(*pair) for name, pair in sums.items()}
    whole = relative_error(before, after)
    return errors if whole is None else errors | {"": whole}


def first_of(module: nn.Module, data: Iterable[Any]) -> list[Batch]:
    """Return the first batches: read once, as data may be shuffled anew each time."""
    device = next(module.parameters()).device
    return list(islice(batches_of(data, device, where="data"), BATCHES))


@torch.no_grad()
def outputs_of(
    module: nn.Module, batches: Iterable[Batch], weights: Mapping[str, torch.Tensor] | None = None
) -> list[Any]:
    """Return what a module gives for these batches in eval mode, with other weights if they are given."""
    module = unwrapped(module)
    with steady(module):
        return [
            torch.func.functional_call(
                module, dict(weights or {}), batch.positional, dict(batch.named)
            )
            for batch in batches
        ]


def relative_error(before: Iterable[Any], after: Iterable[Any]) -> float | None:
    """Return the relative L2 distance of outputs, over all their tensors; none if they have none."""
    pairs = [_pair(previous, other) for previous, other in zip(before, after, strict=True)]
    known = [pair for pair in pairs if pair is not None]
    if not known or len(known) < len(pairs):
        return None
    return error_ratio(sum(pair[0] for pair in known), sum(pair[1] for pair in known))


def _hook(name: str, mask: torch.Tensor, sums: dict[str, list[float]]) -> Callable[..., None]:
    leaf, own = name.rpartition(".")[2], False

    def compare(
        layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        nonlocal own
        if own or not isinstance(output, torch.Tensor):
            return
        weight = layer.get_parameter(leaf)
        own = True
        try:
            kept = {leaf: weight * mask.to(weight.device)}
            other = torch.func.functional_call(layer, kept, args, named)
        finally:
            own = False
        total = sums.setdefault(name, [0.0, 0.0])
        difference, whole = _pair(output, other) or (0.0, 0.0)
        total[0] += difference
        total[1] += whole

    return compare


def _masked(module: nn.Module, masks: Masks) -> Mapping[str, torch.Tensor]:
    parameters = dict(module.named_parameters())
    return {
        name: parameters[name] * mask.to(parameters[name].device) for name, mask in masks.items()
    }


def _pair(left: Any, other: Any) -> tuple[float, float] | None:
    """Return ``(|f - f'|^2, |f|^2)`` over all tensors of an output; none if it has none, or other shapes."""
    first, second = list(_tensors(left)), list(_tensors(other))
    if not first or [a.shape for a in first] != [b.shape for b in second]:
        return None
    pairs = zip(first, second, strict=True)
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return difference, sum(float(a.double().square().sum()) for a in first)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """Yield the floating tensors of an output: of tuples, lists and dicts too, as of several heads."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping | list | tuple):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(item)
