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


class Measuring:
    """The measuring half of a `Library`, whose arguments it has."""

    def __init__(
        self, xp: Namespace, *, wide: Any, cond: Choice, itemsize: Callable[[Any], int]
    ) -> None:
        self.xp, self.wide, self.cond, self.itemsize = xp, wide, cond, itemsize

    def norms(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the L2 norm of each array, 0-d; not finite if any entry is not."""
        every = [tuple(range(len(array.shape))) for array in arrays]
        return self._norms(arrays, every, [self.sum_of_squares(array) for array in arrays])

    def unit_norms(self, array: Array, axes: Axes) -> Array:
        """Return one L2 norm per output unit, shape (units,), in the order of `axes`."""
        rest = tuple(axis for axis in range(len(array.shape)) if axis not in axes)
        (sizes,) = self._norms([array], [rest], [self._summed(self._squares(array), rest)])
        return self.xp.reshape(sizes, (-1,))

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
    ) -> list[Array]:
        """Return roots of sums of squares over these axes, measured again where digits may be lost."""
        roots = [self.widened(self.xp.sqrt(one)) for one in sums]
        doubtful = [n for n, one in enumerate(sums) if self._may_overflow(arrays[n], one)]
        if not doubtful:
            return roots
        good = {place: self._safe(sums[place]) for place in doubtful}
        every = self.xp.all(self.xp.concat([self.xp.reshape(g, (1,)) for g in good.values()]))

        def again(place: int) -> Array:
            careful = lambda: [self._carefully(arrays[place], rests[place])]  # noqa: E731
            return self.cond(good[place], lambda: [roots[place]], careful)[0]

        found = self.cond(
            every, lambda: [roots[n] for n in doubtful], lambda: [again(n) for n in doubtful]
        )
        for place, root in zip(doubtful, found, strict=True):
            roots[place] = root
        return roots

    def _may_overflow(self, array: Array, sums: Array) -> bool:
        # Squares of half precision fit into single, those of single and bfloat16 into double.
        exact = self.itemsize(array.dtype) < self.itemsize(sums.dtype)
        if "bfloat16" in str(array.dtype):
            exact = self.itemsize(sums.dtype) > 4
        return not exact and size(array) > 0

    def _safe(self, sums: Array) -> Array:
        low, high = _SAFE[self.itemsize(sums.dtype)]
        return self.xp.all((sums > low) & (sums < high))

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
