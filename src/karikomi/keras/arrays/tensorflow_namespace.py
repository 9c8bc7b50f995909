"""TensorFlow under array-API names: the operations of rules, measuring and applying."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


class TensorFlowNamespace:
    """`karikomi.functional.library.MEASURE_OPERATIONS` on TensorFlow's tensors."""

    abs = staticmethod(tf.math.abs)
    all = staticmethod(tf.reduce_all)
    any = staticmethod(tf.reduce_any)
    arange = staticmethod(tf.range)
    astype = staticmethod(tf.cast)
    cumulative_sum = staticmethod(tf.math.cumsum)
    exp = staticmethod(tf.math.exp)
    floor = staticmethod(tf.math.floor)
    isfinite = staticmethod(tf.math.is_finite)
    log = staticmethod(tf.math.log)
    maximum = staticmethod(tf.maximum)
    minimum = staticmethod(tf.minimum)
    ones_like = staticmethod(tf.ones_like)
    permute_dims = staticmethod(tf.transpose)
    reshape = staticmethod(tf.reshape)
    sign = staticmethod(tf.math.sign)
    sort = staticmethod(tf.sort)
    sqrt = staticmethod(tf.math.sqrt)
    square = staticmethod(tf.math.square)
    sum = staticmethod(tf.reduce_sum)
    where = staticmethod(tf.where)
    zeros = staticmethod(tf.zeros)
    zeros_like = staticmethod(tf.zeros_like)

    @staticmethod
    def asarray(value: Any, dtype: Any = None) -> tf.Tensor:
        """Return a number, a list or an array as a tensor."""
        return tf.convert_to_tensor(value, dtype=dtype)

    @staticmethod
    def concat(arrays: Any, axis: int = 0) -> tf.Tensor:
        """Return arrays joined along an axis."""
        return tf.concat(arrays, axis)

    @staticmethod
    def max(array: tf.Tensor, axis: Any = None) -> tf.Tensor:
        """Return the largest entries, NaN where there is one."""
        largest = tf.reduce_max(array, axis)
        if not array.dtype.is_floating:
            return largest
        # XLA leaves NaN out of a maximum.
        nan = tf.reduce_any(tf.math.is_nan(array), axis)
        return tf.where(nan, tf.constant(float("nan"), array.dtype), largest)
