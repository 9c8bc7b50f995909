"""Measure weights and apply bounds to them in place: one number per tensor or per unit."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from karikomi.errors import Unsupported
from karikomi.rule import Rule, Scope, order_of
from karikomi.rules.decide import StageDecision
from karikomi.torch.bounding.projections import NearestPoints, unit_shape
from karikomi.torch.numerics.norms import on_host, peak, wide
from karikomi.torch.numerics.orders import Axis, norms_of, unit_norms_of
from karikomi.torch.numerics.scaling import multiply_
from karikomi.torch.numerics.spectral_norm import spectral_norm

_NARROW = (1e-30, 1e30)  # factors that a float32 kernel takes as they are


def measured(
    rule: Rule,
    found: Mapping[str, torch.Tensor],
    axes: Mapping[str, Axis | None],
    vectors: dict[str, torch.Tensor],
    nearest: NearestPoints,
) -> dict[str, np.ndarray]:
    """Return name -> the numbers for the rule, and keep the vectors of power iteration and nearest points."""
    if "distance" in rule.needs:
        return nearest.distances(found, axes)
    if "spectral_norm" in rule.needs:
        sizes = {}
        for name, axis in axes.items():
            size, vectors[name] = spectral_norm(
                found[name], _single(axis, name), vectors.get(name), name=name
            )
            sizes[name] = np.array([size])
        return sizes
    order = order_of(rule)
    if rule.scope is Scope.UNIT:
        units = {
            n: unit_norms_of(found[n], axis, order) for n, axis in axes.items() if axis is not None
        }
        return {name: numbers.cpu().double().numpy() for name, numbers in units.items()}
    if rule.scope is not Scope.ELEMENT:
        every = norms_of([found[name].detach() for name in axes], order).tolist()
        return {name: np.array([number]) for name, number in zip(axes, every, strict=True)}
    size = _depth if "negative_part" in rule.needs else peak
    numbers = on_host([size(found[name]) for name in axes])
    return {name: np.array([number]) for name, number in zip(axes, numbers, strict=True)}


def apply_(
    tensor: torch.Tensor,
    rule: Rule,
    axis: Axis | None,
    numbers: np.ndarray,
    verdict: StageDecision,
    part: slice,
) -> None:
    """Clamp or scale one tensor in place; unchanged units and tensors keep their bits."""
    factors = verdict.factor[part]
    if verdict.limit is not None:
        limit = float(verdict.limit[part][0])
        if numbers[0] > limit:
            tensor.clamp_(-limit, limit)
    elif "negative_part" in rule.needs:
        if factors[0] != 1.0:
            tensor.sub_(tensor.clamp_max(0), alpha=1.0 - float(factors[0]))
    elif len(factors) == 1 and _NARROW[0] < factors[0] < _NARROW[1]:
        if factors[0] != 1.0:
            multiply_(tensor, float(factors[0]))
    elif np.any(factors != 1.0):
        _scale_units_(tensor, axis, factors)


def count_at_bound(
    tensor: torch.Tensor, rule: Rule, numbers: np.ndarray, limit: np.ndarray | None
) -> int | None:
    """Return how many entries are at the bound, ``None`` if no entry can be."""
    if limit is not None:
        most = float(limit[0])
        return int(torch.count_nonzero(tensor.abs() >= most)) if numbers[0] >= most else None
    if "negative_part" in rule.needs:
        return int(torch.count_nonzero(tensor <= 0))
    return None


def _single(axis: Axis | None, name: str) -> int:
    if not isinstance(axis, tuple):
        return axis or 0
    raise Unsupported(
        "a matrix has one axis of units", where=f"torch.bound_(unit_axes): {name}", got=axis
    )


def _scale_units_(tensor: torch.Tensor, axis: Axis | None, factors: np.ndarray) -> None:
    units = tensor.detach()
    if isinstance(axis, tuple):
        scale = torch.from_numpy(factors).reshape(unit_shape(tensor.shape, axis)).to(units.device)
        units.copy_((units * scale).to(units.dtype))
        return
    units = units.reshape(1, *units.shape) if axis is None else units.movedim(axis, 0)
    if len(factors) == 1:
        factors = np.broadcast_to(factors, len(units))
    places = np.flatnonzero(factors != 1.0)
    chosen = torch.from_numpy(places).to(units.device)
    scale = torch.from_numpy(factors[places]).reshape(-1, *[1] * (units.dim() - 1))
    # In float64, because a factor for tiny or huge units may not be a number of their own dtype.
    scale = scale.to(units.device)
    units[chosen] = (units[chosen] * scale).to(units.dtype)


def _depth(tensor: torch.Tensor) -> torch.Tensor:
    """Return how far a tensor reaches below zero; non-finite if any entry is, on either side."""
    if tensor.numel() == 0:
        return peak(tensor)
    low, high = torch.aminmax(tensor.detach())
    depth = (-low).clamp_min(0)
    return torch.where(high < math.inf, depth, high).to(wide(tensor.device))
