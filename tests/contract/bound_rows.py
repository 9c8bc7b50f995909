"""The bounds under contract; they stand beside the clips in `rows`, which joins both lists.

`QKClip` is none of them: it speaks of attention heads, which these laws' tensors do not have, and has laws
of its own in `tests/unit/test_bound_heads.py`.
"""

from __future__ import annotations

import math

import numpy as np

import karikomi as kk
from contract.row import (
    Arrays,
    Axes,
    Row,
    clamped,
    largest,
    largest_unit,
    norm,
    per_unit,
    shrunk,
)

# Of the tensors that the laws speak of, by shape; the gain has none.
FAN_INS = {(4, 3): 3, (4, 0): 3, (4,): 3, (2, 3, 2): 6, (2, 1, 2, 2): 4}
FAN_IN = {"linear.weight": 3, "linear.bias": 3, "up.weight": 6, "grid.weight": 4}


def _on_sphere(unit: np.ndarray) -> np.ndarray:
    size = norm(unit)
    return unit if size <= 1e-30 else unit * (1.0 / size)


def _init_scaled(arrays: Arrays, k: float) -> Arrays:
    limits = [k / math.sqrt(FAN_INS[a.shape]) if a.shape in FAN_INS else math.inf for a in arrays]
    return [np.clip(array, -m, m) for array, m in zip(arrays, limits, strict=True)]


def _times_range(arrays: Arrays, k: float) -> float:
    known = [a for a in arrays if a.shape in FAN_INS]
    return max(float(np.abs(a).max(initial=0.0)) * math.sqrt(FAN_INS[a.shape]) / k for a in known)


def _half_way(size: float, most: float) -> float:
    return 0.5 + 0.5 * most / size if size > most else 1.0


def _elsewhere(arrays: Arrays, axes: Axes) -> Arrays:
    raise AssertionError("left out of these laws, see `rows.ELSEWHERE`")


def _sigma(array: np.ndarray, axis: int) -> float:
    matrix = np.moveaxis(array.astype(np.float64), axis, 0).reshape(array.shape[axis], -1)
    most = float(np.abs(matrix).max(initial=0.0))
    return most * float(np.linalg.svd(matrix / most)[1][0]) if most else 0.0


def _capped(arrays: Arrays, axes: Axes, limit: float) -> Arrays:
    pairs = zip(arrays, axes, strict=True)
    sizes = [0.0 if axis is None else _sigma(array, axis) for array, axis in pairs]
    return [a * (limit / s) if s > limit else a for a, s in zip(arrays, sizes, strict=True)]


def _largest_sigma(arrays: Arrays, axes: Axes) -> float:
    pairs = zip(arrays, axes, strict=True)
    return max(_sigma(array, axis) for array, axis in pairs if axis is not None)


BOUND_ROWS = [
    Row(
        rule=kk.bound.Clamp(0.5),
        reference=lambda arrays, axes: clamped(arrays, 0.5),
        bound=lambda arrays, axes: largest(arrays) / 0.5,
        idempotent=True,
    ),
    Row(
        rule=kk.bound.MaxNorm(1.0),
        reference=per_unit(lambda unit: shrunk(unit, norm(unit), 1.0)),
        bound=largest_unit(1.0),
        idempotent=True,
    ),
    Row(
        rule=kk.bound.UnitNorm(1.0),
        reference=per_unit(_on_sphere),
        bound=largest_unit(1.0),
        idempotent=True,
        always=True,
    ),
    Row(
        rule=kk.bound.NonNegative(),
        reference=lambda arrays, axes: [np.where(array > 0, array, 0.0) for array in arrays],
        idempotent=True,
        always=True,
    ),
    Row(
        rule=kk.bound.Box(-0.25, 0.5),
        reference=lambda arrays, axes: [np.clip(array, -0.25, 0.5) for array in arrays],
        bound=lambda arrays, axes: largest(arrays) / 0.5,
        idempotent=True,
    ),
    Row(
        rule=kk.bound.MinMaxNorm(0.0, 1.0, rate=0.5),
        reference=per_unit(lambda unit: unit * _half_way(norm(unit), 1.0)),
    ),
    # The rest of the way of Box, whose nearest points are others.
    Row(rule=kk.bound.L1Ball(1.0), reference=_elsewhere),
    Row(rule=kk.bound.Simplex(1.0), reference=_elsewhere),
    Row(rule=kk.bound.HalfSpace(1.0, 0.5), reference=_elsewhere),
    Row(
        rule=kk.bound.InitScaled(0.5),
        reference=lambda arrays, axes: _init_scaled(arrays, 0.5),
        bound=lambda arrays, axes: _times_range(arrays, 0.5),
        idempotent=True,
    ),
    Row(
        rule=kk.bound.SpectralCap(1.0),
        reference=lambda arrays, axes: _capped(arrays, axes, 1.0),
        bound=_largest_sigma,
        idempotent=True,
    ),
]
