"""Scale and clamp one array, and round limits to its dtype; for gradients and weights alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from karikomi.rules import decide


def scaled(array: np.ndarray, factor: float | np.ndarray) -> np.ndarray:
    """Return an array times a factor, or an array of factors, itself where all are 1."""
    if np.all(factor == 1.0):
        return array
    # In float64, because a factor for huge gradients may be too small for their own dtype.
    wide = np.result_type(array.dtype, np.float64)
    return np.asarray(array.astype(wide) * factor).astype(array.dtype)


def scaled_units(array: np.ndarray, factors: np.ndarray, axis: int) -> np.ndarray:
    """Return an array with every index of `axis` times its factor, itself where all are 1."""
    shape = [1] * array.ndim
    shape[axis] = -1
    return array if np.all(factors == 1.0) else scaled(array, factors.reshape(shape))


def clamped(array: np.ndarray, largest: float, limit: float) -> np.ndarray:
    """Return an array with magnitudes at most `limit`, itself where `largest` is not above it."""
    return np.asarray(np.clip(array, -limit, limit)) if largest > limit else array


def representable(
    verdict: decide.StageDecision, arrays: Sequence[np.ndarray | None]
) -> decide.StageDecision:
    """Return the decision with limits rounded to the dtypes of the arrays, one array (or ``None``) per limit."""
    # 0.1 is a little more in float32, and clamped entries must not be above the limit.
    if verdict.limit is None:
        return verdict
    with np.errstate(over="ignore"):
        limits = [
            limit if array is None else float(limit.astype(array.dtype))
            for limit, array in zip(verdict.limit, arrays, strict=True)
        ]
    return verdict._replace(limit=np.array(limits, dtype=np.float64))
