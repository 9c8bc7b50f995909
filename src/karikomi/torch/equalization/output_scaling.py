"""Multiply the output units of a layer by factors, in its weight, its bias and its codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.quantize import Coded, UniformGrid
from karikomi.quantize.grids import SMALLEST_SCALE
from karikomi.torch.modules import codes
from karikomi.torch.modules.prunable import TRANSPOSED

Tensor = torch.Tensor


def per_unit(layer: nn.Module, factors: Tensor, weight: Tensor) -> Tensor:
    """Return factors, one per output channel, in a shape that multiplies the weight of a layer."""
    if not isinstance(layer, TRANSPOSED):
        return factors.reshape(-1, *[1] * (weight.dim() - 1))
    # (in, out / groups, ...): the rows of each group have that group's channels.
    groups = layer.groups
    table = factors.reshape(groups, 1, -1).expand(groups, len(weight) // groups, -1)
    return table.reshape(len(weight), -1, *[1] * (weight.dim() - 2))


def unscalable(layer: nn.Module, leaf: str = "weight") -> str | None:
    """Return why the codes of a weight cannot take factors, if there are codes that cannot."""
    coded = codes.of(layer).get(leaf)
    if coded is None:
        return None
    axis = int(isinstance(layer, TRANSPOSED))
    if isinstance(coded.grid, UniformGrid) and coded.grid.axis in (None, axis):
        return None
    return f"its codes refer to a {type(coded.grid).__name__}, which has no scale per unit"


@torch.no_grad()
def scale_outputs_(layer: Any, factors: Tensor) -> None:
    """Multiply the rows of a weight in place; codes keep their integers (up to the sign) and scale their scales.

    A bias is multiplied too, and loses its codes.
    """
    stored = codes.of(layer)
    if "weight" in stored:
        scaled = _scaled(layer, stored["weight"], factors.detach().cpu().double().numpy())
        layer.weight.copy_(codes.decoded(scaled, layer.weight.dtype))
        codes.replace_(layer, "weight", scaled)
    else:
        wide = layer.weight.double() * per_unit(layer, factors.double(), layer.weight)
        layer.weight.copy_(wide)
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() * factors.double())
        codes.replace_(layer, "bias", None)


@torch.no_grad()
def shift_outputs_(layer: Any, shift: Tensor) -> None:
    """Add to the bias of a layer in place, which gets one if it has none."""
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros_like(shift, dtype=layer.weight.dtype))
        layer.bias.requires_grad_(layer.weight.requires_grad)
    layer.bias.copy_(layer.bias.double() + shift.double())
    codes.replace_(layer, "bias", None)


def _scaled(layer: nn.Module, coded: Coded, factors: np.ndarray) -> Coded:
    grid = coded.grid
    assert isinstance(grid, UniformGrid)  # noqa: S101  (`unscalable` refuses the others)
    groups = layer.groups if isinstance(layer, TRANSPOSED) else 1
    axis = int(isinstance(layer, TRANSPOSED))
    scale = np.broadcast_to(grid.scale, factors.shape) * np.abs(factors)
    gone = scale < SMALLEST_SCALE
    sign = torch.from_numpy(np.where(gone, 0, np.sign(factors)).astype(np.int64))
    signs = per_unit(layer, sign, torch.from_numpy(coded.codes)).numpy()
    signed = (coded.codes * signs).astype(coded.codes.dtype)
    scale = np.where(gone, 1.0, scale).astype(np.float32)
    return Coded(signed, UniformGrid(scale, axis, grid.bits, groups))
