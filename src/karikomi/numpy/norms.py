"""Measure arrays: norms and largest magnitudes, in float64 and safe against overflow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from karikomi.errors import NonFinite, check


def norm(array: np.ndarray, order: float = 2.0) -> float:
    """Return the p-norm, ``m * (sum(|x / m|^p))^(1/p)`` with m the largest magnitude; NaN or inf if any entry is."""
    largest = peak(array)
    if largest == 0.0 or not math.isfinite(largest) or math.isinf(order):
        return largest
    scaled = np.abs(array).astype(np.float64) / largest
    if order == 2.0:
        return largest * math.sqrt(float(np.sum(np.square(scaled))))
    return largest * float(np.sum(scaled**order)) ** (1.0 / order)


def peak(array: np.ndarray) -> float:
    """Return the largest magnitude, 0 for an empty array; NaN if any entry is NaN."""
    return float(np.max(np.abs(array))) if array.size else 0.0


def unit_norms(array: np.ndarray, axis: int, order: float = 2.0) -> np.ndarray:
    """Return one norm per index of `axis`, shape ``(array.shape[axis],)``."""
    units = np.moveaxis(array, axis, 0)
    return np.array([norm(unit, order) for unit in units], dtype=np.float64)


def check_finite(names: Sequence[str], finite: np.ndarray, *, where: str) -> None:
    """Raise `NonFinite` with the names of which `finite` is false."""
    bad = sorted({name for name, good in zip(names, finite, strict=True) if not good})
    if bad:
        raise NonFinite(f"non-finite entries in {', '.join(bad[:5])}", where=where)


def check_arrays(arrays: Mapping[str, object], *, where: str) -> None:
    """Raise `InvalidArgument` for objects that are not floating or complex arrays."""
    for name, array in arrays.items():
        got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        floating = isinstance(array, np.ndarray) and array.dtype.kind in "fc"
        check(f"{where}: {name}", (floating, "not a floating array", got, "float, complex"))
