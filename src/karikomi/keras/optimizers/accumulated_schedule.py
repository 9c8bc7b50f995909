"""A learning-rate schedule in micro-batches, for an optimizer that counts updates.

Keras asks schedules by micro-batch and bias corrections by update; who accumulates for an optimizer has to
keep both.
"""

from __future__ import annotations

from typing import Any

import keras


@keras.saving.register_keras_serializable(package="karikomi")
class PerUpdate(keras.optimizers.schedules.LearningRateSchedule):
    """What `schedule` says at the last of the `steps` micro-batches of an update.

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
        """Return what it is made of, as plain data."""
        schedule = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": schedule, "steps": self.steps}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> PerUpdate:
        """Return what `get_config` told."""
        schedule = keras.optimizers.schedules.deserialize(config["schedule"], custom_objects)
        return cls(schedule, config["steps"])
