"""Frequency tables of levels (small signed integers) that are nearly smooth: a few knots each, integers only.

A level `k` has a weight that depends on ``abs(k)``, or on each side by itself. It is given at knots, as an exponent of
two, and interpolated between them; the weights are scaled to frequencies that sum to ``2**precision``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

MOST_LEVEL = 255
KNOTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 255)
"""Magnitudes at which a weight is stored; the last one of a side is its largest magnitude."""
FINE, FINEST = 16, 2
"""Weights are interpolated in sixteenths of an octave; stored exponents count ``4 << detail`` steps an octave."""
MOST_OCTAVES = 25
# round(2**16 * 2**(i / 16)): an octave in sixteenths.
OCTAVE = np.array(
    [65536, 68438, 71468, 74632, 77936, 81386, 84990, 88752]
    + [92682, 96785, 101070, 105545, 110218, 115098, 120194, 125515],
    np.int64,
)

Exponents = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class LevelTable:
    """The frequencies of the levels ``-len(below side) .. len(above side)``, summing to ``2**precision``.

    `sides`: the stored exponents of the negative and of the positive side, each from the one of zero on, which both
    have; `most`: the largest magnitude of each side.
    """

    precision: int
    detail: int
    most: tuple[int, int]
    sides: tuple[Exponents, Exponents]
    counts: NDArray[np.int64]

    def cost(self, tally: NDArray[np.int64]) -> float:
        """Return the bits that a tally of the levels ``-MOST_LEVEL .. MOST_LEVEL`` takes, all of them in the table."""
        part = tally[MOST_LEVEL - self.most[0] : MOST_LEVEL + self.most[1] + 1]
        used = part > 0
        return float((part[used] * (self.precision - np.log2(self.counts[used]))).sum())


@lru_cache(maxsize=512)
def knots_to(most: int) -> tuple[int, ...]:
    """Return the magnitudes of the stored weights of a side up to `most` >= 1, from zero on.

    >>> knots_to(7), knots_to(1)
    ((0, 1, 2, 3, 4, 5, 6, 7), (0, 1))
    """
    return 0, *(knot for knot in KNOTS if knot < most), most


def table_of(
    precision: int, detail: int, most: tuple[int, int], sides: tuple[Exponents, Exponents]
) -> LevelTable:
    """Return the table of stored exponents, each below `limit(detail)`, as many as there are knots."""
    below, above = (_weights(size, side, detail) for size, side in zip(most, sides, strict=True))
    weights = np.concatenate([below[:0:-1], above])
    left = (1 << precision) - weights.size
    counts = 1 + weights * left // int(weights.sum())
    counts[most[0]] += (1 << precision) - int(counts.sum())
    return LevelTable(precision, detail, most, sides, counts)


def limit(detail: int) -> int:
    """Return the number of exponents that a table of this detail can store."""
    return MOST_OCTAVES * (4 << detail)


def fitted(tally: NDArray[np.int64], precision: int, detail: int) -> LevelTable:
    """Return a table for a tally of the levels ``-MOST_LEVEL .. MOST_LEVEL``."""
    sides = tally[MOST_LEVEL::-1].astype(float), tally[MOST_LEVEL:].astype(float)
    most = [max(int(np.flatnonzero(side).max(initial=0)), 1) for side in sides]
    # 64 a count: a tenth of one is still more than nothing.
    left, right = (
        _exponents(64 * side, size, detail) for side, size in zip(sides, most, strict=True)
    )
    return table_of(precision, detail, (most[0], most[1]), (left, right))


def _exponents(side: NDArray, most: int, detail: int) -> Exponents:
    # A knot stands for the numbers around it: their mean is less noisy than its own count.
    knots = knots_to(most)
    edges = [0, *((a + b) // 2 + 1 for a, b in zip(knots, knots[1:], strict=False)), most + 1]
    means = np.add.reduceat(side, edges[:-1]) / np.diff(edges)
    means[-1] = side[edges[-2] : most + 1].mean()
    found = np.rint((4 << detail) * np.log2(np.maximum(means, 1))).astype(int)
    return tuple(np.minimum(found, limit(detail) - 1).tolist())


@lru_cache(maxsize=512)
def _ramp(most: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return for 0..most the knot to the left, the distance from it and its distance to the next one."""
    knots, places = np.array(knots_to(most)), np.arange(most + 1)
    left = np.searchsorted(knots, places, side="right") - 1
    return left, places - knots[left], np.append(np.diff(knots), 1)[left]


def _weights(most: int, stored: Exponents, detail: int) -> NDArray[np.int64]:
    values = np.array(stored, np.int64) * (FINE >> 2 + detail)
    left, ahead, width = _ramp(most)
    sixteenths = values[left] + np.append(np.diff(values), 0)[left] * ahead // width
    return OCTAVE[sixteenths % FINE] << (sixteenths // FINE)
