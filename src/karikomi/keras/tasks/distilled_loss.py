"""Distillation on every backend: the outputs of the dense model stand beside the targets, in one array."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from karikomi.keras.layers.codes import floats_of

ops: Any = keras.ops
WHOLE_NUMBERS = keras.losses.SparseCategoricalCrossentropy
SHARES = keras.losses.CategoricalCrossentropy
LEAST = 1e-7
"""A probability that is smaller counts as this one."""


def can_distil(loss: Any) -> bool:
    """Return whether a loss is a cross-entropy over classes on the last axis, with a model of one output."""
    return type(loss) in (WHOLE_NUMBERS, SHARES) and getattr(loss, "axis", -1) == -1


class DistilledLoss(keras.losses.Loss):
    """``(1 - weight) loss(y, f) + weight T^2 KL(softmax(g / T) || softmax(f / T))``.

    f: the outputs of a model, g: those of its teacher. Targets are those of `joined`. `probabilities`: whether the
    models put out probabilities, whose logarithms are logits.

    >>> own = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> loss = DistilledLoss(own, 0.5, 2.0, probabilities=False)
    >>> logits, targets = np.array([[1.0, 2.0, 3.0]], np.float32), np.array([2])
    >>> both = joined(logits, targets)
    >>> both.shape, round(float(loss(both, logits)), 4)
    ((1, 4), 0.2038)

    Source: Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network.
    """

    def __init__(
        self, loss: Any, weight: float, temperature: float, *, probabilities: bool
    ) -> None:
        super().__init__(name="distilled")
        self._loss, self._weight, self._temperature = loss, weight, temperature
        self._probabilities = probabilities

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the loss of each place."""
        classes = y_pred.shape[-1]
        taught, targets = y_true[..., :classes], y_true[..., classes:]
        if isinstance(self._loss, WHOLE_NUMBERS):
            targets = ops.cast(targets[..., 0], "int32")
        wanted, found = self._softened(taught), self._softened(y_pred)
        apart = ops.sum(ops.exp(wanted) * (wanted - found), axis=-1)
        own = (1.0 - self._weight) * self._loss(targets, y_pred) if self._weight < 1.0 else 0.0
        return own + self._weight * self._temperature**2 * apart

    def _softened(self, outputs: Any) -> Any:
        logits = ops.log(ops.maximum(outputs, LEAST)) if self._probabilities else outputs
        return ops.log_softmax(logits / self._temperature, axis=-1)


def joined(taught: Any, targets: np.ndarray) -> np.ndarray:
    """Return outputs (..., classes) and targets, of shape (...) or (..., classes), along one last axis, in float32."""
    outputs = floats_of(taught, np.float32)
    wide = targets if targets.ndim == outputs.ndim else targets[..., None]
    return np.concatenate([outputs, wide.astype(np.float32)], axis=-1)
