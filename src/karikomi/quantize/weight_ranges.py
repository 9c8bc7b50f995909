"""The range that a grid covers, from the weights alone: all of them, nearly all, or what errs least."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

PERCENTILE = 99.9
"""Of the magnitudes of a group, with linear interpolation."""
RATIOS = np.linspace(1.0, 0.3, 71)
"""Shares of the whole range that are tried for the least squared error."""

Floats = NDArray[np.float64]
Range = tuple[Floats, Floats]
Error = Callable[[Floats, Floats], Floats]


def whole(rows: Floats, error: Error) -> Range:
    """Return the least and the largest weight of each row, with zero: shape (rows, 1)."""
    low = np.min(rows, axis=1, keepdims=True, initial=0.0)
    return low, np.max(rows, axis=1, keepdims=True, initial=0.0)


def percentile(rows: Floats, error: Error) -> Range:
    """Return the range of the magnitudes up to their 99.9th percentile; weights beyond it are clipped.

    Rows without weights have the range 0. Source: the percentile calibration of ONNX Runtime, here of weights.
    """
    if not rows.shape[1]:
        return whole(rows, error)
    limit = np.percentile(np.abs(rows), PERCENTILE, axis=1, keepdims=True)
    low, high = whole(rows, error)
    return np.maximum(low, -limit), np.minimum(high, limit)


def least_error(rows: Floats, error: Error) -> Range:
    """Return the range of the least squared error: shares of the whole one from 1 to 0.3 in steps of 0.01.

    Source: the search for a clip by mean squared error, as in Nagel et al. 2021, "A White Paper on Neural Network
    Quantization", section 3.1.
    """
    low, high = whole(rows, error)
    best, found = error(low, high), np.ones_like(low)
    for ratio in RATIOS[1:]:
        now = error(low * ratio, high * ratio)
        found = np.where(now < best, ratio, found)
        best = np.minimum(now, best)
    return low * found, high * found


RANGES: dict[str, Callable[[Floats, Error], Range]] = {
    "max": whole,
    "percentile": percentile,
    "mse": least_error,
}
"""Name -> ``(rows, error) -> (low, high)``; `error`: the squared error of each row for a range."""
