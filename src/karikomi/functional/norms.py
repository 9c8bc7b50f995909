"""Measure arrays in array-API terms: norms and largest magnitudes that survive overflow and underflow.

A norm is one pass, ``sqrt(sum(x^2))``; only where that sum may have lost digits is the tensor measured
again, in two passes. There is no Python branch on values, so that everything can be traced and compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from karikomi.rule import Array, Namespace

BLOCK = 4_096
"""The most entries of one float32 sum: about 1e-6 off at worst, where one long sum is 1e-3 off on constants."""

Axes = tuple[int, ...]
"""The axes whose indices together name one output unit, in ascending order."""

Choice = Callable[[Array, Callable[[], list], Callable[[], list]], list]

TOGETHER = 16
"""How many arrays share one condition for measuring them again: one condition each takes long to compile."""

LARGEST = 2.0**125
"""In float32, norms above are infinite, and the step is skipped: quotients by them would underflow."""

# Sums of squares between these, by bytes of their dtype, have neither lost digits nor overflowed.
_SAFE = {4: (1e-25, 1e37), 8: (1e-280, 1e307)}
_ANY = (-math.inf, math.inf)
# Above the second, entries are multiplied by the first before they are squared; below the fourth by the third.
_SCALES = {4: (2.0**-80, 2.0**40, 2.0**80, 2.0**-36), 8: (2.0**-650, 2.0**300, 2.0**600, 2.0**-300)}


class Measuring:
    """The measuring half of a `Library`, whose arguments it has."""

    def __init__(
        self, xp: Namespace, *, wide: Any, cond: Choice, itemsize: Callable[[Any], int]
    ) -> None:
        self.xp, self.wide, self.cond, self.itemsize = xp, wide, cond, itemsize

    def norm_vector(self, arrays: Sequence[Array], order: float = 2.0) -> Array:
        """Return the norms of this order, one per array; not finite if any entry of the array is not."""
        rests = [tuple(range(len(array.shape))) for array in arrays]
        if order != 2.0:
            pairs = zip(arrays, rests, strict=True)
            return self.vector([self._of_order(array, rest, order) for array, rest in pairs])
        return self._norms(arrays, rests, self.sums(arrays), [1] * len(arrays))

    def unit_norms(self, array: Array, axes: Axes, order: float = 2.0) -> Array:
        """Return one norm per output unit, shape (units,), in the order of `axes`."""
        rest = tuple(axis for axis in range(len(array.shape)) if axis not in axes)
        if order != 2.0:
            return self.vector([self._of_order(array, rest, order)])
        sums = self.vector([self._summed(self._squares(array), rest)])
        return self._norms([array], [rest], sums, [sums.shape[0]])

    def peak(self, array: Array) -> Array:
        """Return the largest magnitude, 0-d, in the array's own dtype, 0 if empty; NaN if any entry is."""
        magnitudes = self.xp.abs(array)
        return self.xp.max(magnitudes) if size(array) else self.xp.sum(magnitudes)

    def depth(self, array: Array) -> Array:
        """Return how far the array reaches below zero, as `peak` does; NaN if any entry is not finite."""
        below = self.peak(self.xp.minimum(array, self.xp.zeros_like(array)))
        finite = self.xp.all(self.xp.isfinite(array))
        return self.xp.where(finite, below, self.xp.asarray(math.nan, dtype=below.dtype))

    def sums(self, arrays: Sequence[Array]) -> Array:
        """Return the sums of squared magnitudes, one per array."""
        axes = [tuple(range(len(array.shape))) for array in arrays]
        pairs = zip(arrays, axes, strict=True)
        return self.vector([self._summed(self._squares(array), own) for array, own in pairs])

    def sums_in(self, dtype: Any) -> Any:
        """Return the dtype in which squares of real entries are summed: `wide`, or that of the entries."""
        return self.wide if self.itemsize(dtype) < self.itemsize(self.wide) else dtype

    def vector(self, numbers: Sequence[Array]) -> Array:
        """Return numbers and short vectors as one vector in the dtype `wide`."""
        return self.xp.concat([self.xp.reshape(self.widened(number), (-1,)) for number in numbers])

    def constants(self, numbers: Sequence[float]) -> Array:
        """Return known numbers as a vector in the dtype `wide`."""
        return self.xp.asarray([float(number) for number in numbers], dtype=self.wide)

    def widened(self, numbers: Array) -> Array:
        """Return numbers in the dtype `wide`."""
        return self.xp.astype(numbers, self.wide)

    def _of_order(self, array: Array, rest: Axes, order: float) -> Array:
        """Return norms over axes, ``m * (sum((x / m)^p))^(1/p)`` with m the largest magnitude."""
        xp = self.xp
        real = xp.abs(array)
        real = xp.astype(real, self.sums_in(real.dtype))
        if 0 in tuple(array.shape) or order == 1.0:
            return self._in_range(self.widened(self._summed(real, rest)))
        largest = xp.max(real, axis=rest) if rest else real
        # Of rows of a table there may be none at all.
        largest = xp.where(largest < 0, xp.zeros_like(largest), largest)
        if math.isinf(order):
            return self._in_range(self.widened(largest))
        scale = xp.where(xp.isfinite(largest) & (largest > 0), largest, xp.ones_like(largest))
        shape = [1 if axis in rest else length for axis, length in enumerate(real.shape)]
        sums = self._summed((real / xp.reshape(scale, shape)) ** order, rest)
        sums = self.widened(sums)
        zero = sums == 0
        roots = xp.where(zero, xp.ones_like(sums), sums) ** (1.0 / order)
        return self._in_range(xp.where(zero, sums, roots * self.widened(scale)))

    def _in_range(self, sizes: Array) -> Array:
        if self.itemsize(self.wide) > 4:
            return sizes
        return self.xp.where(sizes > LARGEST, math.inf * self.xp.ones_like(sizes), sizes)

    def summed(self, entries: Array, axes: Axes) -> Array:
        """Return sums over axes, in blocks where that is float32."""
        return self._summed(entries, axes)

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
        self, arrays: Sequence[Array], rests: Sequence[Axes], sums: Array, counts: Sequence[int]
    ) -> Array:
        """Return roots of sums of squares over these axes, measured again where digits may be lost."""
        xp = self.xp
        roots = self._rooted(sums)
        limits = [self._limits(array) for array in arrays]
        if all(limit == _ANY for limit in limits):
            return roots
        spread = [limit for limit, count in zip(limits, counts, strict=True) for _ in range(count)]
        low, high = (self.constants(ends) for ends in zip(*spread, strict=True))
        good = (sums > low) & (sums < high)

        def again() -> list[Array]:
            found, start = [], 0
            for first in range(0, len(arrays), TOGETHER):
                several = slice(first, first + TOGETHER)
                part = slice(start, start + sum(counts[several]))
                start = part.stop
                own = (arrays[several], rests[several], limits[several], counts[several])
                found.append(self._again(*own, good[part], roots[part]))
            return [self.vector(found)]

        return self.cond(xp.all(good), lambda: [roots], again)[0]

    def _rooted(self, sums: Array) -> Array:
        # The root of 0 has no derivative, which a caller may need.
        zero = sums == 0
        return self.xp.where(
            zero, sums, self.xp.sqrt(self.xp.where(zero, self.xp.ones_like(sums), sums))
        )

    def _again(
        self,
        arrays: Sequence[Array],
        rests: Sequence[Axes],
        limits: Sequence[tuple[float, float]],
        counts: Sequence[int],
        good: Array,
        roots: Array,
    ) -> Array:
        """Return roots, all of them measured carefully if one of them has to be."""

        def careful() -> list[Array]:
            found, start = [], 0
            for array, rest, limit, count in zip(arrays, rests, limits, counts, strict=True):
                part = slice(start, start + count)
                start = part.stop
                found.append(roots[part] if limit == _ANY else self._carefully(array, rest))
            return [self.vector(found)]

        return self.cond(self.xp.all(good), lambda: [roots], careful)[0]

    def _limits(self, array: Array) -> tuple[float, float]:
        """Return between what a sum of squares has neither lost digits nor overflowed."""
        # Squares of half precision fit into single, those of single and bfloat16 into double.
        dtype = self.xp.abs(array).dtype if "complex" in str(array.dtype) else array.dtype
        own, sums = self.itemsize(dtype), self.itemsize(self.sums_in(dtype))
        exact = sums > 4 if "bfloat16" in str(dtype) else own < sums
        return _ANY if exact or 0 in tuple(array.shape) else _SAFE[sums]

    def _carefully(self, array: Array, rest: Axes) -> Array:
        """Return norms over axes in two passes, entries multiplied by a power of two before they are squared."""
        xp = self.xp
        real = xp.abs(array)
        real = xp.astype(real, self.sums_in(real.dtype))
        largest = xp.max(real, axis=rest) if rest else real
        down, large, up, small = _SCALES[self.itemsize(real.dtype)]
        ones = xp.ones_like(largest)
        scale = xp.where(largest > large, down * ones, xp.where(largest < small, up * ones, ones))
        shape = [1 if axis in rest else length for axis, length in enumerate(real.shape)]
        sums = self._summed(xp.square(real * xp.reshape(scale, shape)), rest)
        return self._in_range(self._rooted(self.widened(sums)) / self.widened(scale))


def size(array: Array) -> int:
    """Return how many entries an array has, a number known before anything is computed."""
    return math.prod(array.shape)


def _entries(array: Array, axes: Axes) -> int:
    return math.prod(array.shape[axis] for axis in axes)
