"""A grid of equal ratios for positive numbers that span many magnitudes, as the variances of batch norms."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from karikomi.errors import InvalidArgument, check
from karikomi.quantize.grids import Coded, check_range
from karikomi.quantize.nearest import finite

LOWEST, HIGHEST = -126, 127
MOST_PER_OCTAVE = 256
_FRACTION = 40


@dataclass(frozen=True, slots=True, eq=False)
class OctaveGrid:
    """Values of equal ratios: code 0 is 0.0, code ``k`` is ``2**(lowest + (k - 1) / per_octave)``.

    `per_octave`: in 1..256; `lowest`: in -126..127; `largest`: the largest code, whose value is below 2**128. Raises
    `InvalidArgument`.

    >>> OctaveGrid(2, -1, 5).decode(np.uint8([0, 1, 3, 5])).tolist()
    [0.0, 0.5, 1.0, 2.0]

    Source: logarithmic quantization, Miyashita, Lee and Murmann 2016. The values are float32 roots of two that are
    computed in integers, so that every machine decodes the same.
    """

    per_octave: int
    lowest: int
    largest: int

    def __post_init__(self) -> None:
        whole = all(type(n) is int for n in (self.per_octave, self.lowest, self.largest))
        fits = whole and 1 <= self.per_octave <= MOST_PER_OCTAVE and LOWEST <= self.lowest
        fits = fits and 0 <= self.largest < 2**16
        fits = fits and self.lowest + max(self.largest - 1, 0) // self.per_octave <= HIGHEST
        got = f"{self.per_octave} per octave from 2**{self.lowest}, codes to {self.largest}"
        check("OctaveGrid", (fits, "values out of range", got, "normal float32 numbers"))

    @property
    def bits(self) -> int:
        """Bits of a code at a fixed width."""
        return max(self.largest.bit_length(), 1)

    @property
    def numbers(self) -> NDArray[np.float32]:
        """None: the parameters say it all."""
        return np.zeros(0, np.float32)

    @property
    def code_dtype(self) -> np.dtype[np.integer]:
        """The narrowest integer type that holds every code."""
        return np.dtype("<u1" if self.largest < 256 else "<u2")

    def check(self, codes: NDArray[np.integer]) -> None:
        """Raise `InvalidArgument` where `codes` do not fit this grid."""
        check_range(codes, 0, self.largest)

    def decode(self, codes: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return the values of codes, float32 in their shape."""
        at, part = np.divmod(codes.astype(np.int64) - 1, self.per_octave)
        values = np.ldexp(_roots(self.per_octave)[part], (self.lowest + at).astype(np.int32))
        return np.where(codes == 0, np.float32(0), values).astype(np.float32).reshape(codes.shape)


def octaves(numbers: ArrayLike, *, per_octave: int = 64, name: str = "numbers") -> Coded:
    """Round numbers >= 0 to powers of ``2**(1 / per_octave)``; zeros stay exact zeros.

    The ratio of a number to its value is at most ``2**(0.5 / per_octave)``: 0.5 % for 64. Numbers below 2**-126 become
    that, and those that round to 2**128 the largest value below. `name` is used in errors only. Raises
    `InvalidArgument` for negative numbers and `per_octave` out of 1..256, `NonFinite` for NaN and infinity.

    >>> octaves(np.float32([0.0, 0.25, 1.01]), per_octave=4).decode().tolist()
    [0.0, 0.25, 1.0]
    """
    array = finite(numbers, name)
    good = type(per_octave) is int and 1 <= per_octave <= MOST_PER_OCTAVE
    check(name, (good, "per_octave out of range", per_octave, f"1..{MOST_PER_OCTAVE}"))
    if (array < 0).any():
        raise InvalidArgument("octaves are of numbers >= 0", where=name, got=float(array.min()))
    some = array > 0
    powers = np.log2(np.maximum(array[some].astype(np.float64), 2.0**LOWEST))
    lowest = int(np.floor(powers.min())) if powers.size else 0
    codes = np.zeros(array.shape, np.int64)
    highest = 1 + (HIGHEST + 1 - lowest) * per_octave - 1
    codes[some] = np.minimum(1 + np.rint((powers - lowest) * per_octave), highest)
    grid = OctaveGrid(per_octave, lowest, int(codes.max(initial=0)))
    return Coded(codes.astype(grid.code_dtype), grid)


@functools.cache
def _roots(per_octave: int) -> NDArray[np.float32]:
    """Return ``2**(i / per_octave)`` for i from 0, by integer arithmetic alone."""
    found = [_root(1 << (i + _FRACTION * per_octave), per_octave) for i in range(per_octave)]
    return np.array([root / 2.0**_FRACTION for root in found], np.float32)


def _root(number: int, degree: int) -> int:
    """Return the largest integer whose power is at most a number, by Newton's iteration from above."""
    root = 1 << -(-number.bit_length() // degree)
    while True:
        lower = ((degree - 1) * root + number // root ** (degree - 1)) // degree
        if lower >= root:
            return root
        root = lower
