"""Sparse gradients of TensorFlow: rows of a table, of which one may occur several times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from karikomi.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Slices:
    """The rows of a sparse gradient, the places that they belong to, and the shape of the whole."""

    values: tf.Tensor
    indices: tf.Tensor
    shape: tuple[int, ...]

    @property
    def dtype(self) -> Any:
        """The dtype of the rows."""
        return self.values.dtype

    def summed(self) -> tf.Tensor:
        """Return as many rows: the sum of rows with equal indices at the first of them, zeros at the others."""
        count = tf.shape(self.indices)[0]
        first = tf.math.unsorted_segment_min(tf.range(count), self.indices, self.shape[0])
        rows = tf.math.unsorted_segment_sum(self.values, tf.gather(first, self.indices), count)
        return tf.ensure_shape(rows, self.values.shape)

    def densified(self) -> tf.Tensor:
        """Return the whole, with zeros where there is no row."""
        return tf.math.unsorted_segment_sum(self.values, self.indices, self.shape[0])

    def to_tensorflow(self) -> tf.IndexedSlices:
        """Return the sparse gradient as ``tf.IndexedSlices``."""
        return tf.IndexedSlices(self.values, self.indices, tf.constant(self.shape, tf.int64))


def from_tensorflow(array: Any, shape: Any, *, where: str) -> tf.Tensor | Slices:
    """Return a gradient whose shape is known, of the gradient itself or of its variable."""
    sparse = isinstance(array, tf.IndexedSlices)
    known = tf.TensorShape(shape)
    if sparse and not known.is_fully_defined() and array.dense_shape is not None:
        known = tf.TensorShape(tf.get_static_value(tf.convert_to_tensor(array.dense_shape)))
    elif not sparse and not known.is_fully_defined():
        known = array.shape
    if not known.is_fully_defined():
        raise InvalidArgument(
            "the shape of this gradient is not known", where=where, hint="pass variables="
        )
    if sparse:
        return Slices(array.values, array.indices, tuple(length or 0 for length in known))
    return array if array.shape == known else tf.ensure_shape(array, known)
