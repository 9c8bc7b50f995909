"""Round to the nearest point of a uniform grid whose scale comes from the largest weight."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from karikomi.errors import InvalidArgument, NonFinite
from karikomi.quantize.grids import LEAST_BITS, MOST_BITS, SMALLEST_SCALE, Coded, UniformGrid


def uniform(
    weights: ArrayLike, *, bits: int = 8, axis: int | None = 0, name: str = "weights"
) -> Coded:
    """Quantize to a symmetric uniform grid: one scale per index of `axis`, or one for the tensor.

    ``scale = max|w| / (2**(bits-1) - 1)``; ``code = round_half_to_even(w / scale)``. A channel of
    zeros gets scale 1. The error of every weight is at most ``scale / 2``.

    `weights` is a real array of any shape; `bits` is in 2..16; `axis` may be negative, and is
    ``None`` for one scale in all. `name` is used in errors only. Raises `InvalidArgument` for an
    argument out of range and `NonFinite` for NaN or infinite weights.

    >>> coded = uniform(np.float32([[1.5, -0.6], [0.0, 0.0]]), bits=3)
    >>> coded.codes.tolist(), coded.grid.scale.tolist()
    ([[3, -1], [0, 0]], [0.5, 1.0])

    Source: max-abs calibration of weights as in ONNX Runtime and NNCF (zero point 0).
    """
    array = finite(weights, name)
    if type(bits) is not int or not LEAST_BITS <= bits <= MOST_BITS:
        raise InvalidArgument(
            "bits out of range", where=f"uniform of {name}", got=bits, allowed="2..16"
        )
    axis = _axis(axis, array.ndim, name)
    others = None if axis is None else tuple(i for i in range(array.ndim) if i != axis)
    peak = np.max(np.abs(array), axis=others, keepdims=True, initial=0.0).astype(np.float64)
    limit = 2 ** (bits - 1) - 1
    scale = np.where(peak == 0, 1.0, np.maximum(peak / limit, SMALLEST_SCALE)).astype(np.float32)
    codes = np.clip(np.rint(array / scale.astype(np.float64)), -limit, limit)
    grid = UniformGrid(scale.reshape(-1), axis, bits)
    return Coded(np.asarray(codes, dtype=grid.code_dtype), grid)


def finite(weights: ArrayLike, name: str) -> NDArray[np.float32]:
    """Return `weights` as float32, or raise `NonFinite` or `InvalidArgument` naming the tensor."""
    array = np.asarray(weights)
    if array.dtype.kind not in "fiu":
        raise InvalidArgument("weights must be real numbers", where=name, got=array.dtype)
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise NonFinite(
            "weights are NaN, infinite or beyond float32",
            where=name,
            got=f"{bad} of {array.size}",
            hint="quantize finite weights only",
        )
    return array


def _axis(axis: int | None, rank: int, name: str) -> int | None:
    if axis is None:
        return None
    if type(axis) is not int or not -rank <= axis < rank:
        raise InvalidArgument(
            "axis out of range",
            where=f"uniform of {name}",
            got=f"{axis!r} for a tensor of rank {rank}",
            allowed=f"None or {-rank}..{rank - 1}" if rank else "None",
        )
    return axis % rank
