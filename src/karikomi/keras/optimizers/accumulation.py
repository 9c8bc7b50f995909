"""Gradients of micro-batches and of replicas: added up, averaged and handed on, sparse ones as they are.

Variables that a gradient overwrites (the scales of float8) are left out of all that but the accumulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from karikomi.keras.arrays.variables import value_of


def is_overwritten(variable: Any) -> bool:
    """Return whether a variable takes its gradient for its value."""
    return bool(getattr(variable, "overwrite_with_gradient", False))


def sums(grads: Sequence[Any], variables: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
    """Return each gradient and what is kept of those before it, added up; of what is overwritten the largest."""
    found = []
    for grad, variable, sum_before in zip(grads, variables, kept, strict=True):
        if grad is not None:
            before = value_of(sum_before)
            grad = keras.ops.convert_to_tensor(grad, dtype=sum_before.dtype)
            grad = keras.ops.maximum(grad, before) if is_overwritten(variable) else grad + before
        found.append(grad)
    return found


def quotients(grads: Sequence[Any], variables: Sequence[Any], divisor: Any) -> list[Any]:
    """Return gradients over a number."""
    pairs = zip(grads, variables, strict=True)
    return [g if g is None or is_overwritten(v) else _quotient(g, divisor) for g, v in pairs]


def shares(arrays: Sequence[Any], variables: Sequence[Any], replicas: int) -> list[Any]:
    """Return the arrays of a `Clip` as gradients that add up to them over the replicas."""
    grads = [
        array.to_tensorflow() if hasattr(array, "to_tensorflow") else array for array in arrays
    ]
    return grads if replicas == 1 else quotients(grads, variables, replicas)


def _quotient(grad: Any, divisor: Any) -> Any:
    if hasattr(grad, "dense_shape"):
        return type(grad)(grad.values / divisor, grad.indices, grad.dense_shape)
    return grad / divisor
