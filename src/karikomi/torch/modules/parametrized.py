"""Parameters that are no weights themselves: a layer computes its weight from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from karikomi.torch.modules.parameters import unwrapped

MASKED = "masked by torch.nn.utils.prune, whose remove() makes it a weight again"
ADAPTED = "an adapter is added to it: merge the adapter first, in PEFT by merge_adapter()"
_BY_HOOK = {"_orig": "spectral_norm", "_g": "weight_norm", "_v": "weight_norm"}


def computed_from(module: nn.Module) -> dict[str, str]:
    """Return the name of each parameter that a weight is computed from -> what computes it, and the way out.

    These are what ``torch.nn.utils.parametrize`` registers (spectral norm, weight norm, orthogonal, LoRA
    written as a parametrization), and what the older hooks of ``torch.nn.utils`` register. A bound or a mask of
    such a parameter is none of the weight.

    >>> from torch.nn.utils.parametrizations import weight_norm
    >>> list(computed_from(weight_norm(nn.Linear(4, 2))))
    ['parametrizations.weight.original0', 'parametrizations.weight.original1']
    """
    module = unwrapped(module)
    reasons: dict[int, str] = {}
    for layer in module.modules():
        for parameter, reason in (*_by_parametrization(layer), *_by_hook(layer)):
            reasons.setdefault(id(parameter), reason)
    return {n: reasons[id(item)] for n, item in module.named_parameters() if id(item) in reasons}


def own_class_(layer: nn.Module) -> None:
    """Give a parametrized layer a class of its own.

    ``torch.nn.utils.parametrize`` makes properties of a class, which deep copies share: what is registered on one, or
    removed, would be so on all.
    """
    if not parametrize.is_parametrized(layer):
        return
    shared = type(layer)
    own: Any = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    layer.__class__ = own


def with_adapters(module: nn.Module) -> dict[str, str]:
    """Return the name of each parameter that an adapter is added to (LoRA in PEFT) -> the way out.

    The layer's weight is the sum, unless the adapter is merged.
    """
    return {
        f"{prefix}.base_layer.{leaf}" if prefix else f"base_layer.{leaf}": ADAPTED
        for prefix, layer in unwrapped(module).named_modules()
        if isinstance(getattr(layer, "base_layer", None), nn.Module)
        and not getattr(layer, "merged", False)
        for leaf, _ in layer.base_layer.named_parameters(recurse=False)  # type: ignore[union-attr]
        if leaf != "bias"
    }


def _by_parametrization(layer: nn.Module) -> Iterator[tuple[nn.Parameter, str]]:
    if not parametrize.is_parametrized(layer):
        return
    chains: Any = layer.parametrizations
    for leaf, chain in chains.items():
        kinds = ", ".join(type(item).__name__.strip("_") for item in chain)
        way_out = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {leaf!r})"
        for parameter in chain.parameters():
            yield parameter, f"{leaf} is computed from it ({kinds}): {way_out} makes it a weight"


def _by_hook(layer: nn.Module) -> Iterator[tuple[nn.Parameter, str]]:
    own = dict(layer.named_parameters(recurse=False))
    for leaf, parameter in own.items():
        for ending, kind in _BY_HOOK.items():
            weight = leaf.removesuffix(ending)
            if weight in {leaf, *own} or not isinstance(getattr(layer, weight, None), torch.Tensor):
                continue
            if hasattr(layer, f"{weight}_mask"):
                yield parameter, MASKED
            else:
                way_out = f"torch.nn.utils.remove_{kind}(layer, {weight!r})"
                yield (
                    parameter,
                    f"{weight} is computed from it ({kind}): {way_out} makes it a weight",
                )
