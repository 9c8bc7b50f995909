"""Sums and means of gradients over micro-batches and replicas, and schedules in updates.

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
    """Return the sum of each gradient and those before it; of overwritten variables the maximum."""
    found = []
    for grad, variable, sum_before in zip(grads, variables, kept, strict=True):
        if grad is not None:
            before = value_of(sum_before)
            grad = keras.ops.convert_to_tensor(grad, dtype=sum_before.dtype)
            grad = keras.ops.maximum(grad, before) if is_overwritten(variable) else grad + before
        found.append(grad)
    return found


def quotients(grads: Sequence[Any], variables: Sequence[Any], divisor: Any) -> list[Any]:
    """Return gradients divided by a number."""
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


@keras.saving.register_keras_serializable(package="karikomi")
class PerUpdate(keras.optimizers.schedules.LearningRateSchedule):
    """The value of `schedule` at the last of the `steps` micro-batches of an update.

    Keras counts micro-batches for schedules and updates for bias corrections; both hold with this.

    >>> import keras
    >>> decay = keras.optimizers.schedules.PiecewiseConstantDecay([3], [1.0, 0.5])
    >>> [float(PerUpdate(decay, 4)(update)) for update in (0, 1)]
    [1.0, 0.5]
    """

    def __init__(self, schedule: Any, steps: int) -> None:
        self.schedule, self.steps = schedule, steps

    def __call__(self, step: Any) -> Any:
        """Return the learning rate of an update, by the number of updates before it."""
        return self.schedule(step * self.steps + (self.steps - 1))

    def get_config(self) -> dict[str, Any]:
        """Return the configuration, as plain data."""
        schedule = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": schedule, "steps": self.steps}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> PerUpdate:
        """Return the schedule of a configuration."""
        schedule = keras.optimizers.schedules.deserialize(config["schedule"], custom_objects)
        return cls(schedule, config["steps"])
