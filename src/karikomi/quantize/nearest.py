"""Round to the nearest point of a uniform grid whose scale comes from the largest weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from karikomi.errors import InvalidArgument, NonFinite, check, check_known
from karikomi.quantize.affine import AffineGrid
from karikomi.quantize.grids import (
    SMALLEST_SCALE,
    Coded,
    UniformGrid,
    check_bits,
    split_units,
)
from karikomi.quantize.units import OutputUnits, from_rows, to_rows
from karikomi.quantize.weight_ranges import RANGES, Floats
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
@dataclass(frozen=True, slots=True, kw_only=True)
class UniformQuantizer:
    """The nearest value of a uniform grid, by default `uniform` with one scale per output unit.

    `range`: "max" covers all weights; "percentile" 99.9 % of their magnitudes, and "mse" what gives the least squared
    error, with the weights beyond clipped. `symmetric`: no zero point; else the grid covers ``[min, max]``, with zero
    on it. `group`: so many consecutive weights of a unit have a scale of their own. Raises `InvalidArgument`.

    >>> coded = UniformQuantizer(group=2).quantize(np.float32([[7, 1, 14]]), 4, units=OutputUnits(0))
    >>> coded.grid.scale.tolist(), coded.decode().tolist()
    ([1.0, 2.0], [[7.0, 1.0, 14.0]])

    Source: as registered; the ranges in `karikomi.quantize.weight_ranges`.
    """

    range: str = "max"
    symmetric: bool = True
    group: int | None = None

    argument = "bits"

    def __post_init__(self) -> None:
        check_known(self.range, RANGES, "unknown range", where="UniformQuantizer")
        some = self.group is None or (type(self.group) is int and self.group >= 1)
        allowed = "None, or an integer >= 1"
        check("UniformQuantizer", (some, "group out of range", self.group, allowed))

    def quantize(
        self, weights: NDArray, size: int, *, units: OutputUnits, name: str = "weights"
    ) -> Coded:
        """Return codes of `size` bits and their grid."""
        check_bits(size, f"uniform of {name}")
        plain = self.symmetric and self.group is None
        if plain and self.range == "max":
            return uniform(weights, bits=size, axis=units.axis, groups=units.groups, name=name)
        array = finite(weights, name)
        rows = grouped(to_rows(array, units), self.group).astype(np.float64)
        scale, zero = self._steps(rows, size)
        codes, shape = self._codes(rows, scale, zero, size), array.shape
        length = units.rows(shape)[1]
        codes = from_rows(codes.reshape(units.rows(shape)[0], -1)[:, :length], shape, units)
        if plain:
            grid = UniformGrid(scale.reshape(-1), units.axis, size, units.groups)
            return Coded(codes.astype(grid.code_dtype), grid)
        shift = 2 ** (size - 1) - 1 if self.symmetric else 0
        middle = (zero + shift).astype(np.float32).reshape(-1)
        affine = AffineGrid(scale.reshape(-1), middle, units, size, self.group)
        return Coded((codes + shift).astype(affine.code_dtype), affine)

    def _codes(self, rows: Floats, scale: NDArray[np.float32], zero: Floats, size: int) -> Floats:
        low, high = (
            (1 - 2 ** (size - 1), 2 ** (size - 1) - 1) if self.symmetric else (0, 2**size - 1)
        )
        return np.clip(np.rint(rows / scale.astype(np.float64)) + zero, low, high)

    def _steps(self, rows: Floats, size: int) -> tuple[NDArray[np.float32], Floats]:
        """Return scale and zero point of each row of a group."""

        def error(low: Floats, high: Floats) -> Floats:
            scale, zero = step(low, high)
            values = scale * (self._codes(rows, scale, zero, size) - zero)
            return np.square(values - rows).sum(1, keepdims=True)

        def step(low: Floats, high: Floats) -> tuple[NDArray[np.float32], Floats]:
            levels = 2 ** (size - 1) - 1 if self.symmetric else 2**size - 1
            span = np.maximum(-low, high) if self.symmetric else high - low
            wide = np.where(span == 0, 1.0, np.maximum(span / levels, SMALLEST_SCALE))
            scale = wide.astype(np.float32)
            zero = np.zeros_like(low) if self.symmetric else np.rint(-low / scale)
            return scale, np.clip(zero, 0, levels)

        return step(*RANGES[self.range](rows, error))


def narrowed(coded: Coded, *, bits: int = 8, axis: int = 0) -> Coded:
    """Return codes of at most `bits` bits with one scale per index of `axis`: what integer kernels multiply.

    A unit whose codes on a `UniformGrid` fit already keeps them and its scale. Any other gets what errs least, by the
    sum of squares: its codes clipped at its own scale, or new codes at the scale of `weight_ranges.least_error`.

    >>> wide = Coded(np.int16([[300, -2], [5, 1]]), UniformGrid(np.float32([0.5]), None, 10))
    >>> coded = narrowed(wide)
    >>> coded.grid.scale[1], coded.codes[1].tolist(), float(abs(coded.decode() - wide.decode()).max()) < 1
    (np.float32(0.5), [5, 1], True)
    """
    values, units = coded.decode(), OutputUnits(axis)
    fresh = UniformQuantizer(range="mse").quantize(values, bits, units=units)
    grid = coded.grid
    if not isinstance(grid, UniformGrid) or grid.groups != 1 or grid.axis not in (None, axis):
        return fresh
    scale = np.broadcast_to(grid.scale, fresh.grid.numbers.shape)
    own = UniformGrid(scale.astype(np.float32), axis, bits)
    clipped = Coded(np.clip(coded.codes, -own.limit, own.limit).astype(own.code_dtype), own)
    others = tuple(place for place in range(values.ndim) if place != axis)
    kept = _squares(clipped, values, others) <= _squares(fresh, values, others)
    both = UniformGrid(np.where(kept, own.scale, fresh.grid.numbers), axis, bits)
    chosen = np.expand_dims(kept, others)
    return Coded(np.where(chosen, clipped.codes, fresh.codes), both)


def _squares(coded: Coded, values: NDArray[np.float32], others: tuple[int, ...]) -> Floats:
    return np.square(coded.decode().astype(np.float64) - values).sum(others)


def grouped(rows: NDArray, group: int | None) -> NDArray:
    """Return (rows, weights) as (rows * groups, weights of a group), the last group of each row filled with zeros.

    >>> grouped(np.float32([[1, 2, 3]]), 2).tolist()
    [[1.0, 2.0], [3.0, 0.0]]
    """
    if group is None or not rows.size:
        return rows
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % group))).reshape(-1, group)


def finite(weights: ArrayLike, name: str) -> NDArray[np.float32]:
    """Return `weights` as float32, or raise `NonFinite` or `InvalidArgument` naming the tensor."""
    array = np.asarray(weights)
    # NumPy knows bfloat16 and float8, which ml_dtypes brings, by name alone.
    narrow = array.dtype.name.startswith(("bfloat", "float8"))
    if array.dtype.kind not in "fiu" and not narrow:
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
