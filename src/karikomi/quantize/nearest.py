"""Round to the nearest point of a uniform grid whose scale comes from the largest weight."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from karikomi.errors import InvalidArgument, NonFinite, check
from karikomi.quantize.grids import (
    SMALLEST_SCALE,
    Coded,
    UniformGrid,
    check_bits,
    split_units,
)
from karikomi.quantize.quantizer import OutputUnits
from karikomi.registry import register


def uniform(
    weights: ArrayLike,
    *,
    bits: int = 8,
    axis: int | None = 0,
    groups: int = 1,
    name: str = "weights",
) -> Coded:
    """Quantize to a symmetric uniform grid: one scale per index of `axis`, or one for the tensor.

    ``scale = max|w| / (2**(bits-1) - 1)``; ``code = round_half_to_even(w / scale)``. A channel of
    zeros gets scale 1. The error of every weight is at most ``scale / 2``.

    `weights` is a real array of any shape; `bits` is in 2..16; `axis` may be negative, and is
    ``None`` for one scale in all. `groups`: the first axis splits into so many equal parts with scales
    of their own, as in a grouped transposed convolution. `name` is used in errors only. Raises
    `InvalidArgument` for an argument out of range and `NonFinite` for NaN or infinite weights.

    >>> coded = uniform(np.float32([[1.5, -0.6], [0.0, 0.0]]), bits=3)
    >>> coded.codes.tolist(), coded.grid.scale.tolist()
    ([[3, -1], [0, 0]], [0.5, 1.0])

    Source: max-abs calibration of weights as in ONNX Runtime and NNCF (zero point 0).
    """
    array = finite(weights, name)
    where, rank = f"uniform of {name}", array.ndim
    check_bits(bits, where)
    if axis is not None:
        good = type(axis) is int and -rank <= axis < rank
        got = f"{axis!r} for a tensor of rank {rank}"
        check(where, (good, "axis out of range", got, f"None or -{rank} <= axis < {rank}"))
        axis %= rank
    good = type(groups) is int and groups >= 1 and axis and array.shape[0] % groups == 0
    got = f"{groups!r} for shape {array.shape} and axis {axis}"
    allowed = "1, or a divisor of the first axis, with an axis after it"
    check(where, (groups == 1 or good, "groups out of range", got, allowed))
    split, units = split_units(array.shape, axis, groups)
    parts = array.reshape(split)
    others = tuple(i for i, length in enumerate(units) if length == 1)
    peak = np.max(np.abs(parts), axis=others, keepdims=True, initial=0.0).astype(np.float64)
    limit = 2 ** (bits - 1) - 1
    scale = np.where(peak == 0, 1.0, np.maximum(peak / limit, SMALLEST_SCALE)).astype(np.float32)
    codes = np.clip(np.rint(parts / scale.astype(np.float64)), -limit, limit)
    grid = UniformGrid(scale.reshape(-1), axis, bits, groups)
    return Coded(np.asarray(codes, dtype=grid.code_dtype).reshape(array.shape), grid)


@register(
    "quantizer",
    name="uniform",
    formula="w = scale * code, scale = max|w| of an output unit / (2**(bits-1) - 1)",
    source="max-abs calibration of weights as in ONNX Runtime and NNCF",
)
class UniformQuantizer:
    """`uniform` with one scale per output unit."""

    argument = "bits"

    def quantize(
        self, weights: NDArray, size: int, *, units: OutputUnits, name: str = "weights"
    ) -> Coded:
        """Return codes of `size` bits and their grid."""
        return uniform(weights, bits=size, axis=units.axis, groups=units.groups, name=name)


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
