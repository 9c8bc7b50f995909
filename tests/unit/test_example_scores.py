"""Scores of examples: their mean is the metric, or there are none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from karikomi.errors import InvalidArgument
from karikomi.tasks import Data, Task, accuracy
from karikomi.tasks.example_scores import example_scores


def task(**changes: Any) -> Task:
    return Task(**{"name": "t", "model": dict, "data": lambda: Data(*[None] * 3), **changes})


def cosine(outputs: np.ndarray, targets: np.ndarray) -> float:
    norms = np.linalg.norm(outputs, axis=1) * np.linalg.norm(targets, axis=1)
    return float(np.mean(np.sum(outputs * targets, axis=1) / norms))


def correlation(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float(np.corrcoef(outputs[:, 0], targets[:, 0])[0, 1]) if len(outputs) > 1 else 0.0


def needs_many(outputs: np.ndarray, targets: np.ndarray) -> float:
    if len(outputs) < 2:
        raise ValueError("too few")
    return 0.5


RANDOM = np.random.default_rng(0)


def test_of_an_accuracy_they_are_right_or_wrong() -> None:
    outputs, targets = RANDOM.normal(size=(50, 4)), RANDOM.integers(0, 4, 50)
    scores = example_scores(task(), outputs, targets)
    assert scores is not None and set(scores) == {0.0, 1.0}
    assert scores.mean() == accuracy(outputs, targets)


def test_examples_of_several_targets_are_weighted_by_those_that_count() -> None:
    outputs, targets = RANDOM.normal(size=(30, 5, 4)), RANDOM.integers(0, 4, (30, 5))
    targets[:, 3:] = np.where(RANDOM.random((30, 2)) < 0.5, -100, targets[:, 3:])
    scores = example_scores(task(class_axis=-1), outputs, targets)
    assert scores is not None and scores.mean() == pytest.approx(
        accuracy(outputs, targets, class_axis=-1)
    )


@pytest.mark.parametrize("metric", ["mean_squared_error", cosine])
def test_of_means_they_are_the_terms(metric: Any) -> None:
    outputs, targets = RANDOM.normal(size=(20, 6)), RANDOM.normal(size=(20, 6))
    of = task(metric=metric)
    scores = example_scores(of, outputs, targets)
    assert scores is not None and scores.shape == (20,)
    assert scores.mean() == pytest.approx(of.judge(outputs, targets))


@pytest.mark.parametrize("metric", [correlation, needs_many])
def test_a_metric_that_is_no_mean_has_none(metric: Any) -> None:
    outputs, targets = RANDOM.normal(size=(20, 2)), RANDOM.normal(size=(20, 2))
    assert example_scores(task(metric=metric), outputs, targets) is None


@pytest.mark.parametrize(
    ("name", "wanted"), [("mean_squared_error", [2.5, 8.0]), ("mean_absolute_error", [1.5, 2.0])]
)
def test_of_a_built_in_error_it_is_that_of_each_example(name: str, wanted: list[float]) -> None:
    task = Task(name="t", model=dict, data=dict, metric=name)
    outputs, targets = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[3.0, 1.0], [4.0, 0.0]])
    assert (task.error, task.direction) == (name, "min")
    assert example_scores(task, outputs, targets).tolist() == wanted
    assert task.judge(outputs, targets) == np.mean(wanted)
    with pytest.raises(InvalidArgument, match="differ in shape"):
        task.judge(outputs, targets[:, 0])
