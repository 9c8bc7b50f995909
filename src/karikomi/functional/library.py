"""Measure and apply for array libraries that never write in place: JAX, TensorFlow and Keras."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from karikomi.functional.norms import Axes, Measuring
from karikomi.rule import ARRAY_OPERATIONS, Array

MEASURE_OPERATIONS = ARRAY_OPERATIONS | {"all", "concat", "permute_dims", "sign"}
"""The operations that a namespace must have; `max` and `sum` take axes."""


class Library(Measuring):
    """One array library.

    `xp`: its namespace, with `MEASURE_OPERATIONS`. `wide`: its widest float, in which norms, factors
    and limits come. `cond`: ``cond(predicate, first, other)`` calls one of two functions without
    arguments and returns its list of arrays, whose shapes are the same for both. `itemsize`: bytes of a dtype.
    """

    def scaled(self, arrays: Sequence[Array], factors: Array) -> list[Array]:
        """Return arrays times a number of a vector each: their own bits at 1, zeros at 0."""
        return [self._times(array, factors[place]) for place, array in enumerate(arrays)]

    def scaled_units(self, array: Array, factors: Array, axes: Axes) -> Array:
        """Return an array with every output unit times its own factor."""
        shape = [length if axis in axes else 1 for axis, length in enumerate(array.shape)]
        return self._times(array, self.xp.reshape(factors, shape))

    def scaled_below_zero(self, array: Array, factor: Array) -> Array:
        """Return an array whose negative entries are multiplied by a number."""
        return self.xp.where(array < 0, self._times(array, factor), array)

    def clamped(self, array: Array, limit: Array) -> Array:
        """Return an array with magnitudes at most `limit`, a number or an array like it."""
        most = self.xp.astype(limit, array.dtype)
        return self.xp.minimum(self.xp.maximum(array, -most), most)

    def finite(self, array: Array) -> Array:
        """Return an array with zeros for its entries that are not finite."""
        real = self.xp.abs(array) if "complex" in str(array.dtype) else array
        return self.xp.where(self.xp.isfinite(real), array, self.xp.zeros_like(array))

    def representable(self, limits: Array, dtypes: Sequence[Any]) -> Array:
        """Return limits rounded to these dtypes, so that clamped entries are not above them."""
        for dtype in dict.fromkeys(dtypes):
            if dtype is not None and self.itemsize(dtype) < self.itemsize(self.wide):
                rounded = self.widened(self.xp.astype(limits, dtype))
                own = self.flags([item == dtype for item in dtypes])
                limits = self.xp.where(own, rounded, limits)
        return limits

    def picked(self, vector: Array, places: Sequence[int]) -> Array:
        """Return some numbers of a vector, by their places in ascending order."""
        if len(places) == vector.shape[0]:
            return vector
        return self.xp.concat([vector[place : place + 1] for place in places] or [vector[:0]])

    def flags(self, booleans: Sequence[bool]) -> Array:
        """Return known booleans as a vector."""
        return self.xp.asarray([bool(boolean) for boolean in booleans])

    def _times(self, array: Array, factor: Array) -> Array:
        # In the widest float, because a factor for huge entries may be too small for their own dtype.
        narrow = self.itemsize(array.dtype) < self.itemsize(self.wide)
        kind = self.wide if narrow and "complex" not in str(array.dtype) else array.dtype
        changed = self.xp.astype(array, kind) * self.xp.astype(factor, kind)
        # Not even a NaN is left of what is multiplied by 0.
        changed = self.xp.where(factor == 0, self.xp.zeros_like(changed), changed)
        return self.xp.astype(changed, array.dtype)
