"""What a model was compiled with, and the metrics of frameworks in NumPy, for models that come trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class CompiledWith:
    """Loss, metric, goal and axis of the classes that a framework has for a model; None for what it has not."""

    loss: Any = None
    metric: Any = None
    goal: str | None = None
    class_axis: int | None = None


def cosine(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean cosine between the outputs of examples and those of the dense network.

    >>> cosine(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[2.0, 0.0], [0.0, 1.0]]))
    1.0
    """
    first, second = (a.reshape(len(a), -1).astype(np.float64) for a in (outputs, targets))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    products = np.sum(first * second, axis=1)
    # Two zeros are the same output.
    same = (norms == 0) & ~np.any(first != second, axis=1)
    return float(np.mean(np.where(same, 1.0, products / np.where(norms == 0, 1.0, norms))))


def categorical_accuracy(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the share of rows whose largest output is at the largest target, on the last axis (one-hot targets).

    >>> categorical_accuracy(np.array([[0.2, 0.8], [0.6, 0.4]]), np.array([[0, 1], [0, 1]]))
    0.5
    """
    return float(np.mean(outputs.argmax(-1) == targets.argmax(-1)))


def binary_accuracy(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the share of outputs that are above 0.5 where the target is, as Keras has it.

    >>> binary_accuracy(np.array([[0.2], [0.8]]), np.array([1, 1]))
    0.5
    """
    found = outputs.reshape(-1) > _THRESHOLD
    return float(np.mean(found == (targets.reshape(-1) > _THRESHOLD)))


def mean_absolute_error(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean of the absolute differences.

    >>> mean_absolute_error(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    1.0
    """
    return float(np.mean(np.abs(outputs.reshape(targets.shape).astype(np.float64) - targets)))
