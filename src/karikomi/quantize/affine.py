"""Grids with a zero point, and with scales of their own for groups of a unit's weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import check
from karikomi.quantize.grids import (
    SMALLEST_SCALE,
    Shape,
    check_bits,
    check_range,
    check_vector,
)
from karikomi.quantize.units import OutputUnits, from_rows, to_rows


@dataclass(frozen=True, slots=True, eq=False)
class AffineGrid:
    """Evenly spaced values around an exact zero: ``w = scale * (code - zero)``, codes in ``[0, 2**bits - 1]``.

    The weights of each output unit lie in a row, in C order; `group` consecutive ones of a row have a scale and a zero
    point, the last group being shorter; ``None``: all of a row. `units`: the output units. `scale`: float32, positive,
    not subnormal; `zero`: float32 whole numbers in ``[0, 2**bits - 1]``; both of shape ``(rows * groups of a row,)``,
    row by row. `bits`: 2..16. Raises `InvalidArgument`.

    >>> grid = AffineGrid(np.float32([0.5, 1.0]), np.float32([1, 0]), OutputUnits(0), 4)
    >>> grid.decode(np.uint8([[0, 3], [0, 15]])).tolist()
    [[-0.5, 1.0], [0.0, 15.0]]

    Source: the affine convention of ONNX Runtime, NNCF and LiteRT; groups as in GPTQ (Frantar et al. 2023).
    """

    scale: NDArray[np.float32]
    zero: NDArray[np.float32]
    units: OutputUnits
    bits: int
    group: int | None = None

    def __post_init__(self) -> None:
        check_vector(self.scale, "scale", "AffineGrid")
        check_vector(self.zero, "zero", "AffineGrid")
        check_bits(self.bits, "AffineGrid")
        smallest = float(np.min(self.scale, initial=np.inf))
        whole = bool(np.all((self.zero == np.rint(self.zero)) & (self.zero >= 0)))
        inside = whole and float(np.max(self.zero, initial=0)) < 2**self.bits
        some = self.group is None or (type(self.group) is int and self.group >= 1)
        check(
            "AffineGrid",
            (smallest >= SMALLEST_SCALE, "a scale is not positive, or subnormal", smallest, None),
            (inside, "zero points out of range", None, f"whole numbers in 0..{2**self.bits - 1}"),
            (self.zero.size == self.scale.size, "one zero point per scale is needed", None, None),
            (some, "group out of range", self.group, "None, or an integer >= 1"),
        )

    @property
    def numbers(self) -> NDArray[np.float32]:
        """The scales, and then the zero points."""
        return np.concatenate([self.scale, self.zero])

    @property
    def code_dtype(self) -> np.dtype[np.integer]:
        """The narrowest integer type that holds every code."""
        return np.dtype("<u1" if self.bits <= 8 else "<u2")

    def check(self, codes: NDArray[np.integer]) -> None:
        """Raise `InvalidArgument` where `codes` do not fit this grid."""
        fits = self.units.fit(codes.shape)
        check("Coded", (fits, "the units are not in the tensor", str(self.units), codes.shape))
        wanted = scales_of(codes.shape, self.units, self.group)
        got = f"{self.scale.size} scales"
        check("Coded", (self.scale.size == wanted, "a group lacks its scale", got, wanted))
        check_range(codes, 0, 2**self.bits - 1)

    def decode(self, codes: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return ``scale * (code - zero)`` in float32, in the shape of `codes`: one rounding per weight."""
        rows = to_rows(codes.astype(np.float32), self.units)
        scale, zero = self.spread(codes.shape)
        return from_rows((rows - zero) * scale, codes.shape, self.units)

    def spread(self, shape: Shape) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return scale and zero point of each weight, (rows, weights of a row) for a tensor's shape."""
        rows, length = self.units.rows(shape)
        at = np.arange(length) // (self.group or max(length, 1))
        split = (rows, -1) if self.scale.size else (rows, 0)
        return self.scale.reshape(split)[:, at], self.zero.reshape(split)[:, at]


def scales_of(shape: Shape, units: OutputUnits, group: int | None) -> int:
    """Return how many scales a tensor has.

    >>> scales_of((6, 5), OutputUnits(0), 2)
    18
    """
    rows, length = units.rows(shape)
    return rows * (1 if group is None else -(-length // group)) if length else 0
