"""Tests of means: whether values are above zero on average, and how far a metric can be from another."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special

from karikomi.tasks import Task
from karikomi.tasks.example_scores import example_scores

REDRAWS = 200


def rise_p(values: np.ndarray) -> float:
    """Return the probability of a mean as large as that of `values` if their true mean were 0; a one-sided normal test.

    0.5 where they do not vary around 0, or are fewer than two.

    >>> rise_p(np.zeros(9)), rise_p(np.ones(50) + np.linspace(-0.1, 0.1, 50)) < 1e-6
    (0.5, True)
    """
    values = values[np.isfinite(values)]
    if len(values) < 2 or not values.any():
        return 0.5
    error = values.std(ddof=1) / np.sqrt(len(values))
    if error == 0:
        return 0.0 if values[0] > 0 else 1.0
    return float(special.ndtr(-values.mean() / error))


def drop_by_redrawing(
    task: Task,
    outputs: tuple[np.ndarray, np.ndarray],
    targets: np.ndarray,
    *,
    seed: int,
    redraws: int = REDRAWS,
) -> list[float] | None:
    """Return the 95 % interval of the drop of any metric: examples drawn anew with replacement, the same for both.

    None where the metric cannot be computed of so few or repeated examples, or is not finite.

    Source: the percentile bootstrap, Efron 1979.
    """
    generator = np.random.default_rng(seed)
    worse = _worse(task, outputs, targets)
    drops = []
    for _ in range(redraws):
        drawn = generator.integers(0, len(targets), len(targets))
        if worse is not None:
            drops.append(float(worse[drawn].mean()))
            continue
        try:
            before, after = (task.judge(part[drawn], targets[drawn]) for part in outputs)
        except (ArithmeticError, ValueError):
            return None
        drops.append(task.drop(before, after))
    low, high = np.quantile(drops, [0.025, 0.975]).tolist()
    return [low, high] if np.isfinite([low, high]).all() else None


def _worse(task: Task, outputs: tuple[np.ndarray, np.ndarray], targets: np.ndarray) -> Any:
    """Return by how much each example got worse, whose mean is the drop of any redraw; None if there is no such number.

    Not of targets that do not count: a redraw has another number of them. Not of a metric function: it would be called
    for each example.
    """
    plain = task.classifies and not np.any(targets == task.ignore_index)
    if not plain and task.error is None:
        return None
    before, after = (example_scores(task, output, targets) for output in outputs)
    if before is None or after is None:
        return None
    return before - after if task.direction == "max" else after - before
