"""Measure arrays in array-API terms: norms and largest magnitudes that survive overflow and underflow.

A norm is one pass, ``sqrt(sum(x^2))``; only where that sum may have lost digits is the tensor measured
again, in two passes. No branch on values is Python's, so that everything can be traced and compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from niwaki.rule import Array, Namespace

BLOCK = 4_096
"""The most entries of one float32 sum: about 1e-6 off at worst, where one long sum is 1e-3 off on constants."""

Axes = tuple[int, ...]
"""The axes whose indices together name one output unit, in ascending order."""

Choice = Callable[[Array, Callable[[], list], Callable[[], list]], list]

# Sums of squares between these, by bytes of their dtype, have neither lost digits nor overflowed.
_SAFE = {4: (1e-25, 1e37), 8: (1e-280, 1e307)}
_ANY = (-math.inf, math.inf)


class Measuring:
    """The measuring half of a `Library`, whose arguments it has."""

    def __init__(
        self, xp: Namespace, *, wide: Any, cond: Choice, itemsize: Callable[[Any], int]
    ) -> None:
        self.xp, self.wide, self.cond, self.itemsize = xp, wide, cond, itemsize

    def norm_vector(self, arrays: Sequence[Array]) -> Array:
        """Return the L2 norms, one per array; not finite if any entry of the array is not."""
        every = [tuple(range(len(array.shape))) for array in arrays]
        return self._norms(arrays, every, [self.sum_of_squares(array) for array in arrays])

    def unit_norms(self, array: Array, axes: Axes) -> Array:
        """Return one L2 norm per output unit, shape (units,), in the order of `axes`."""
        rest = tuple(axis for axis in range(len(array.shape)) if axis not in axes)
        return self._norms([array], [rest], [self._summed(self._squares(array), rest)])

    def peaks(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the largest magnitude of each array, 0-d, 0 for an empty one; NaN if any entry is."""
        return [self.widened(self.peak(array)) for array in arrays]

    def depths(self, arrays: Sequence[Array]) -> list[Array]:
        """Return how far each array reaches below zero, 0-d; NaN if any entry is not finite."""
        return [self.widened(self._depth(array)) for array in arrays]

    def peak(self, array: Array) -> Array:
        """Return the largest magnitude in the array's own dtype; NaN if any entry is."""
        magnitudes = self.xp.abs(array)
        return self.xp.max(magnitudes) if size(array) else self.xp.sum(magnitudes)

    def sum_of_squares(self, array: Array) -> Array:
        """Return the sum of squared magnitudes, 0-d, in the dtype `sums_in`."""
        return self._summed(self._squares(array), tuple(range(len(array.shape))))

    def sums_in(self, dtype: Any) -> Any:
        """Return the dtype in which squares of real entries are summed: `wide`, or that of the entries."""
        return self.wide if self.itemsize(dtype) < self.itemsize(self.wide) else dtype

    def vector(self, numbers: Sequence[Array]) -> Array:
        """Return numbers and short vectors as one vector in the dtype `wide`."""
        return self.xp.concat([self.xp.reshape(self.widened(one), (-1,)) for one in numbers])

    def constants(self, numbers: Sequence[float]) -> Array:
        """Return known numbers as a vector in the dtype `wide`."""
        return self.xp.asarray([float(number) for number in numbers], dtype=self.wide)

    def widened(self, numbers: Array) -> Array:
        """Return numbers in the dtype `wide`."""
        return self.xp.astype(numbers, self.wide)

    def _squares(self, array: Array) -> Array:
        real = self._real(array)
        return self.xp.square(self.xp.astype(real, self.sums_in(real.dtype)))

    def _real(self, array: Array) -> Array:
        return self.xp.abs(array) if "complex" in str(array.dtype) else array

    def _summed(self, squares: Array, axes: Axes) -> Array:
        """Sum over axes, where that is float32 a block of the last ones at a time."""
        if self.itemsize(squares.dtype) > 4 or _entries(squares, axes) <= BLOCK:
            return self.xp.sum(squares, axis=axes) if axes else squares
        last = len(axes)
        while _entries(squares, axes[last - 1 :]) <= BLOCK:
            last -= 1
        if last == len(axes):
            return self._summed(self._blocked(squares, axes[-1]), axes)
        done = axes[last:]
        left = tuple(axis - sum(gone < axis for gone in done) for axis in axes[:last])
        return self._summed(self.xp.sum(squares, axis=done), left)

    def _blocked(self, squares: Array, axis: int) -> Array:
        """Return sums of blocks along an axis that is longer than one."""
        before, after = (slice(None),) * axis, squares.shape[axis + 1 :]
        rows = squares.shape[axis] // BLOCK
        blocks = (*squares.shape[:axis], rows, BLOCK, *after)
        body = self.xp.reshape(squares[(*before, slice(0, rows * BLOCK))], blocks)
        sums = self.xp.sum(body, axis=axis + 1)
        if rows * BLOCK == squares.shape[axis]:
            return sums
        tail = self.xp.sum(squares[(*before, slice(rows * BLOCK, None))], axis=axis)
        tail = self.xp.reshape(tail, (*squares.shape[:axis], 1, *after))
        return self.xp.concat([sums, tail], axis=axis)

    def _norms(
        self, arrays: Sequence[Array], rests: Sequence[Axes], sums: Sequence[Array]
    ) -> Array:
        """Return roots of sums of squares over these axes, measured again where digits may be lost."""
        total = self.vector(sums)
        roots = self.xp.sqrt(total)
        limits = [self._limits(*pair) for pair in zip(arrays, sums, strict=True)]
        if all(limit == _ANY for limit in limits):
            return roots
        spread = [limit for limit, one in zip(limits, sums, strict=True) for _ in range(size(one))]
        low, high = (self.constants(ends) for ends in zip(*spread, strict=True))
        good = (total > low) & (total < high)

        def again() -> list[Array]:
            found, start = [], 0
            for array, rest, limit, one in zip(arrays, rests, limits, sums, strict=True):
                part = slice(start, start + size(one))
                start = part.stop
                found.append(self._carefully_again(array, rest, limit, good[part], roots[part]))
            return [self.vector(found)]

        return self.cond(self.xp.all(good), lambda: [roots], again)[0]

    def _carefully_again(
        self, array: Array, rest: Axes, limit: tuple[float, float], good: Array, roots: Array
    ) -> Array:
        if limit == _ANY:
            return roots
        careful = lambda: [self.xp.reshape(self._carefully(array, rest), (-1,))]  # noqa: E731
        return self.cond(self.xp.all(good), lambda: [roots], careful)[0]

    def _limits(self, array: Array, sums: Array) -> tuple[float, float]:
        """Return between what a sum of squares has neither lost digits nor overflowed."""
        # Squares of half precision fit into single, those of single and bfloat16 into double.
        exact = self.itemsize(array.dtype) < self.itemsize(sums.dtype)
        if "bfloat16" in str(array.dtype):
            exact = self.itemsize(sums.dtype) > 4
        return _ANY if exact or not size(array) else _SAFE[self.itemsize(sums.dtype)]

    def _carefully(self, array: Array, rest: Axes) -> Array:
        """Return norms over axes in two passes, ``m * sqrt(sum((x / m)^2))``, m the largest magnitude."""
        xp = self.xp
        real = xp.abs(array)
        real = xp.astype(real, self.sums_in(real.dtype))
        largest = xp.max(real, axis=rest) if rest else real
        divisor = xp.where(largest > 0, largest, xp.ones_like(largest))
        shape = [1 if axis in rest else length for axis, length in enumerate(real.shape)]
        sums = self._summed(xp.square(real / xp.reshape(divisor, shape)), rest)
        sizes = self.widened(largest) * self.widened(xp.sqrt(sums))
        return xp.where((largest > 0) & xp.isfinite(largest), sizes, self.widened(largest))

    def _depth(self, array: Array) -> Array:
        below = self.peak(self.xp.minimum(array, self.xp.zeros_like(array)))
        finite = self.xp.all(self.xp.isfinite(array))
        return self.xp.where(finite, below, self.xp.asarray(math.nan, dtype=below.dtype))


def size(array: Array) -> int:
    """Return how many entries an array has, a number known before anything is computed."""
    return math.prod(array.shape)


def _entries(array: Array, axes: Axes) -> int:
    return math.prod(array.shape[axis] for axis in axes)
