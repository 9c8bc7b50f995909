"""What the levels before tell about the next one in each lane: how large it may be, and which sign is likelier.

Weights beside each other in a kernel resemble one another in size and in sign. Integers only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from karikomi.pack.codecs.level_tables import MOST_LEVEL

SIXTEENTHS = 4
"""Binary logarithm of the parts of a level in which means are counted."""
WEIGHTS = (7, 2, 4, 11, 8)
"""Of the level before, of the one before it, of the one `lag` before, of the running mean and of the stated one.

They sum to 32; found by least squares on the trained ResNet-20 and ResNet-56, where they hardly differ.
"""
DECAY, FRACTION, COARSE = 5, 6, 3
"""Binary logarithms of the length of the running mean, of its parts of a sixteenth, and of what an energy drops."""
BLOCK = 2**16
"""Levels whose contexts are computed at once."""
MOST_ENERGY = (sum(WEIGHTS) * MOST_LEVEL << SIXTEENTHS) >> COARSE


class Neighbours:
    """The levels before, in every lane; `stated`: the stated mean of the tensor at each step, one row or all."""

    __slots__ = ("lag", "mean", "ring", "stated", "step")

    def __init__(self, stated: NDArray[np.int64], lag: int) -> None:
        width = stated.shape[1]
        self.stated, self.lag, self.step = stated << COARSE, lag, 0
        self.mean = stated[0] << FRACTION
        self.ring = [np.zeros(width, np.int64) for _ in range(max(lag, 2))]

    def context(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the energy, and the sum of those neighbours whose sign is likely that of the next level."""
        last, two, far = self.ring[-1], self.ring[-2], self.ring[-self.lag]
        stated = self.stated[self.step % len(self.stated), : last.size]
        return _context(last, two, far, self.mean, stated)

    def push(self, levels: NDArray[np.int64]) -> None:
        """Take the next level of every lane."""
        change = np.abs(levels)
        change <<= SIXTEENTHS + FRACTION
        change -= self.mean
        change >>= DECAY
        self.mean = self.mean + change
        self.ring = [*self.ring[1:], levels]
        self.step += 1

    def drop_last(self) -> None:
        """Go on without the last lane."""
        self.mean = self.mean[:-1]
        self.ring = [levels[:-1] for levels in self.ring]


def contexts_of(
    levels: NDArray[np.int16], stated: NDArray[np.int64], lag: int
) -> Iterator[tuple[slice, NDArray[np.int64], NDArray[np.int64]]]:
    """Yield what `Neighbours.context` returns of levels that are all known: (steps, lanes), some steps at a time.

    Only the running mean needs the step before; everything else is computed at once.
    """
    steps, width = levels.shape
    deep, rows = max(lag, 2), max(BLOCK // width, 1)
    mean, stated = stated[0] << FRACTION, stated << COARSE
    padded = np.concatenate([np.zeros((deep, width), levels.dtype), levels])
    for start in range(0, steps, rows):
        part = padded[start : start + rows + deep].astype(np.int64)
        count = len(part) - deep
        means = np.empty((count + 1, width), np.int64)
        means[0] = mean
        sizes = np.abs(part[deep:]) << SIXTEENTHS + FRACTION
        for size, now, then in zip(sizes, means[:-1], means[1:], strict=True):
            np.subtract(size, now, out=then)
            np.right_shift(then, DECAY, out=then)
            np.add(then, now, out=then)
        mean = means[-1]
        own = stated[start : start + count] if len(stated) > 1 else stated
        last, two, far = (part[deep - back :][:count] for back in (1, 2, lag))
        yield slice(start, start + count), *_context(last, two, far, means[:-1], own)


def _context(
    last: NDArray[np.int64],
    two: NDArray[np.int64],
    far: NDArray[np.int64],
    mean: NDArray[np.int64],
    stated: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    size = np.abs(last)
    energy = size << 3
    energy -= size
    energy += np.abs(two) << 1
    energy += np.abs(far) << 2
    energy <<= SIXTEENTHS
    energy += mean * WEIGHTS[3] >> FRACTION
    energy += stated
    energy >>= COARSE
    return energy, last + far
