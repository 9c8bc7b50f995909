"""The output units of weights, by the type of their layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from karikomi.quantize import OutputUnits
from karikomi.torch.modules.parameters import unit_axes, unit_axis_of, unwrapped
from karikomi.torch.modules.prunable import TRANSPOSED

_BY_HOOK = {"weight_orig": "weight", "weight_v": "weight"}


def output_units(module: nn.Module) -> dict[str, OutputUnits]:
    """Return parameter name -> its output units, of each parameter that has them.

    The weight of a transposed convolution has shape ``(in, out / groups, ...)``: the first axis splits
    into the groups, and an output channel is an index of the second axis within one group. What a layer computes
    its weight from has the units of the weight, if it is the largest such matrix.

    >>> from torch.nn import ConvTranspose1d
    >>> output_units(ConvTranspose1d(4, 6, 3, groups=2))
    {'weight': OutputUnits(axis=1, groups=2)}
    """
    units = {name: OutputUnits(axis) for name, axis in unit_axes(module)[0].items()}
    for prefix, layer in unwrapped(module).named_modules():
        for leaf, weight, name in (("weight", None, "weight"), *_computed(layer)):
            found = _units(layer, leaf, weight)
            if found is not None:
                units[f"{prefix}.{name}" if prefix else name] = found
    return units


def _units(layer: nn.Module, leaf: str, weight: torch.Tensor | None) -> OutputUnits | None:
    """Return the units of a grouped transposed convolution, and of any layer for a computed `weight`."""
    if isinstance(layer, TRANSPOSED) and layer.groups > 1 and leaf == "weight":
        return OutputUnits(1, layer.groups)
    axis = None if weight is None else unit_axis_of(layer, leaf, weight)[0]
    return None if axis is None else OutputUnits(axis)


def _computed(layer: nn.Module) -> Iterator[tuple[str, torch.Tensor, str]]:
    """Yield ``(leaf of the weight, parameter, its name)`` of the largest parameter that a weight is computed from."""
    chains: Any = layer.parametrizations if parametrize.is_parametrized(layer) else {}
    for leaf, chain in chains.items():
        originals = dict(chain.named_parameters(recurse=False))
        most = max((item.numel() for item in originals.values()), default=0)
        for name, parameter in originals.items():
            # The weight itself is not computed: that may move buffers, as in spectral_norm.
            if parameter.numel() == most and parameter.dim() > 1:
                yield leaf, parameter, f"parametrizations.{leaf}.{name}"
    own = dict(layer.named_parameters(recurse=False))
    for name, leaf in _BY_HOOK.items():
        if name in own and isinstance(getattr(layer, leaf, None), torch.Tensor):
            yield leaf, own[name], name
