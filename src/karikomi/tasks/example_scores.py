"""One number per example whose mean is the metric: what a paired comparison of two networks is made of."""

from __future__ import annotations

import warnings

import numpy as np

from karikomi.tasks.metrics import error_of_each
from karikomi.tasks.task import Task

_TOLERANCE = 1e-6
_MOST_CALLS = 20_000


def example_scores(task: Task, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray | None:
    """Return (n,) numbers whose mean is the task's metric of these outputs, or None where there are none.

    Of the accuracy: the share of an example's targets that are right, in [0, 1]; where examples have different
    numbers of targets that count, weighted by them. Of a mean error: that of each example. Of a metric
    function: its value of each example alone, where the mean of these is its value of all; a metric such as a
    correlation or an F1 score has no such numbers.

    >>> from karikomi.tasks import load
    >>> example_scores(load("digits"), np.eye(3), np.array([0, 1, 1])).tolist()
    [1.0, 1.0, 0.0]
    """
    n = len(targets)
    if task.classifies:
        found, counts = task.predictions(outputs, targets)
        right = ((found == targets) & counts).reshape(n, -1).sum(axis=1)
        return right / max(float(counts.reshape(n, -1).sum(axis=1).mean()), 1e-300)
    if task.error is not None and outputs.shape == targets.shape:
        return error_of_each(task.error, outputs, targets)
    if n > _MOST_CALLS:
        return None
    return _each(task, outputs, targets)


def _each(task: Task, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray | None:
    metric = task.metric
    if not callable(metric):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a correlation of one example
            alone = [
                float(metric(outputs[k : k + 1], targets[k : k + 1])) for k in range(len(targets))
            ]
        whole = float(metric(outputs, targets))
    except Exception:  # noqa: BLE001  (a metric of one example may be undefined: then it is no mean of examples)
        return None
    scores = np.array(alone, dtype=np.float64)
    same = abs(scores.mean() - whole) <= _TOLERANCE * max(abs(whole), 1.0)
    return scores if np.isfinite(scores).all() and same else None
