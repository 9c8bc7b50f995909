"""Measure and apply with TensorFlow: one pass to measure and one to scale, eager or in a graph.

Without XLA every operation is a separate pass over memory, so that general code is slow here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from karikomi.functional.library import Library
from karikomi.functional.norms import Axes
from karikomi.keras.arrays.indexed_slices import Slices
from karikomi.keras.arrays.tensorflow_namespace import TensorFlowNamespace

PART = 1 << 18
"""Entries of one float32 sum: 3e-7 off on constants at most. TensorFlow's own sums hardly grow worse with size, but
XLA's do: 1e-5 for four parts, 2e-4 for a hundred."""

_LEAST = 1.2e-38  # factors below are no normal float32
_BITS = {2: tf.int16, 4: tf.int32, 8: tf.int64}


class TensorFlowLibrary(Library):
    """Tensors of TensorFlow, and `Slices`."""

    def __init__(self) -> None:
        super().__init__(
            TensorFlowNamespace(),
            wide=tf.float64,
            cond=_cond,
            itemsize=lambda dtype: tf.as_dtype(dtype).size,
        )

    def norm_vector(self, arrays: Sequence[Any], order: float = 2.0) -> tf.Tensor:
        """Return the norms as one vector."""
        return super().norm_vector([_whole(array) for array in arrays], order)

    def sums(self, arrays: Sequence[tf.Tensor]) -> tf.Tensor:
        """Return the sums of squared magnitudes in float64, of float32 squares."""
        halves = [self._half(array) for array in arrays]
        if len({half.dtype for half in halves}) > 1:
            halves = [self.widened(half) for half in halves]
        return 2.0 * self.widened(tf.stack(halves))

    def sums_in(self, dtype: Any) -> Any:
        """Return float32 except for float64: a wider dtype would need a copy here."""
        return tf.float64 if dtype == tf.float64 else tf.float32

    def _summed(self, squares: tf.Tensor, axes: Axes) -> tf.Tensor:
        if squares.shape.is_fully_defined():
            return super()._summed(squares, axes)
        return tf.reduce_sum(squares, axis=axes) if axes else squares

    def _half(self, array: tf.Tensor) -> tf.Tensor:
        """Return half of the sum of squared magnitudes."""
        real = self._real(array)
        if real.dtype in (tf.float16, tf.bfloat16):
            real = tf.cast(real, tf.float32)
        count = real.shape.num_elements()
        if count is None or count <= PART:
            return tf.nn.l2_loss(real)
        # Such parts of one row are no copies.
        row = tf.reshape(real, (-1,))
        parts = [row[start : start + PART] for start in range(0, count, PART)]
        return tf.reduce_sum(self.widened(tf.stack([tf.nn.l2_loss(part) for part in parts])))

    def unit_norms(self, array: Any, axes: Axes, order: float = 2.0) -> tf.Tensor:
        """Return one norm per output unit."""
        if not isinstance(array, Slices):
            return super().unit_norms(array, axes, order)
        rows = super().unit_norms(array.summed(), axes, order)
        if axes != (0,):
            return rows
        return tf.math.unsorted_segment_sum(rows, array.indices, array.shape[0])

    def peak(self, array: Any) -> tf.Tensor:
        """Return the largest magnitude; NaN if any entry is."""
        magnitudes = tf.abs(_whole(array))
        if magnitudes.shape.num_elements() == 0:
            return tf.reduce_sum(magnitudes)
        # As whole numbers, which have the order of the floats that they are, and NaN above all of them:
        # XLA leaves NaN out of a maximum.
        bits = tf.bitcast(magnitudes, _BITS[magnitudes.dtype.size])
        return tf.bitcast(tf.maximum(tf.reduce_max(bits), 0), magnitudes.dtype)

    def scaled(self, arrays: Sequence[Any], factors: Any) -> list[Any]:
        """Return arrays times a number of a vector each."""
        if not arrays:
            return []
        rows = [array.values if isinstance(array, Slices) else array for array in arrays]
        # Zeros are left of a product with zero only where no entry is NaN.
        unusual = tf.reduce_any(factors < _LEAST)
        careful = lambda: super(TensorFlowLibrary, self).scaled(rows, factors)  # noqa: E731
        done = self.cond(unusual, careful, lambda: _products(rows, factors))
        return [_like(array, rows) for array, rows in zip(arrays, done, strict=True)]

    def scaled_units(self, array: Any, factors: tf.Tensor, axes: Axes) -> Any:
        """Return an array with every output unit times its own factor."""
        if not isinstance(array, Slices):
            return super().scaled_units(array, factors, axes)
        if axes != (0,):
            return _like(array, super().scaled_units(array.values, factors, axes))
        own = tf.gather(factors, array.indices)
        own = tf.reshape(own, [-1, *[1] * (len(array.shape) - 1)])
        return _like(array, self._times(array.values, own))

    def clamped(self, array: Any, limit: tf.Tensor) -> Any:
        """Return an array with magnitudes at most `limit`."""
        if isinstance(array, Slices):
            return _like(array, super().clamped(array.summed(), limit))
        return super().clamped(array, limit)

    def finite(self, array: Any) -> Any:
        """Return an array with zeros for its entries that are not finite."""
        if isinstance(array, Slices):
            return _like(array, super().finite(array.values))
        return super().finite(array)


def _cond(predicate: Any, first: Callable[[], list], other: Callable[[], list]) -> list:
    return tf.cond(predicate, first, other)


def _whole(array: Any) -> tf.Tensor:
    return array.summed() if isinstance(array, Slices) else array


def _like(array: Any, rows: tf.Tensor) -> Any:
    if isinstance(array, Slices):
        return Slices(rows, array.indices, array.shape)
    if not rows.shape.is_fully_defined():
        # A branch forgets it.
        rows = tf.ensure_shape(rows, array.shape)
    return rows


def _products(rows: Sequence[tf.Tensor], factors: tf.Tensor) -> list[tf.Tensor]:
    numbers: dict[Any, list[tf.Tensor]] = {}
    done = []
    for place, array in enumerate(rows):
        # Half-precision factors would be 1e-3 off.
        kind = tf.float32 if array.dtype in (tf.float16, tf.bfloat16) else array.dtype
        if kind not in numbers:
            numbers[kind] = tf.unstack(tf.cast(factors, kind))
        product = tf.cast(array, kind) * numbers[kind][place]
        done.append(tf.cast(product, array.dtype))
    return done
