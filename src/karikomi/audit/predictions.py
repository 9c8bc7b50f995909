"""Comparison of predicted classes: accuracy per class, and changed examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from karikomi.errors import NonFinite
from karikomi.tasks import Split, Task

LISTED, SHOWN = 20, 6
"""Changed examples that a result lists, the others being only counted; those whose inputs it carries."""
MOST_NUMBERS = 10_000
"""Numbers of an input that a result carries."""


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Class numbers of n targets that count: the true ones, and the predictions of each network.

    `places`: where they are among all targets, by default 0..n - 1.

    >>> facts = Predictions(np.array([0, 1, 1]), np.array([0, 1, 0]), np.array([0, 0, 0])).facts()
    >>> facts["changed"], facts["lost"], facts["gained"], facts["classes"][1]["after"]
    (1, 1, 0, 0.0)
    """

    targets: np.ndarray
    before: np.ndarray
    after: np.ndarray
    places: np.ndarray | None = None

    def facts(self) -> dict[str, Any]:
        """Return the part of an audit's result that is about predictions."""
        right_before, right_after = self.before == self.targets, self.after == self.targets
        changed = self.before != self.after
        lost, gained = right_before & ~right_after, right_after & ~right_before
        neither = changed & ~lost & ~gained
        order = np.concatenate([np.flatnonzero(kind) for kind in (lost, gained, neither)])
        return {
            "classes": self._classes(right_before, right_after),
            "agreement": float(np.mean(~changed)),
            "changed": int(changed.sum()),
            "lost": int(lost.sum()),
            "gained": int(gained.sum()),
            "changed_examples": [self._example(index) for index in order[:LISTED].tolist()],
        }

    def _classes(self, right_before: np.ndarray, right_after: np.ndarray) -> list[dict[str, Any]]:
        names, places, counts = np.unique(self.targets, return_inverse=True, return_counts=True)
        shares = [
            np.bincount(places, weights=right, minlength=len(names)) / counts
            for right in (right_before, right_after)
        ]
        lost = right_before & ~right_after
        return [
            {
                "class": str(name),
                "examples": int(count),
                "before": float(b),
                "after": float(a),
                "predicted": [int(np.sum(said == name)) for said in (self.before, self.after)],
                **_commonest(self.after[lost & (places == place)]),
            }
            for place, (name, count, b, a) in enumerate(zip(names, counts, *shares, strict=True))
        ]

    def _example(self, index: int) -> dict[str, Any]:
        classes = {"label": self.targets, "before": self.before, "after": self.after}
        place = index if self.places is None else int(self.places[index])
        return {"index": place, **{key: str(value[index]) for key, value in classes.items()}}


def _commonest(labels: np.ndarray) -> dict[str, Any]:
    """Return what most of the lost examples of a class are called now, and how many of them."""
    if not len(labels):
        return {"became": None, "became_examples": 0}
    names, counts = np.unique(labels, return_counts=True)
    most = int(counts.argmax())
    return {"became": str(names[most]), "became_examples": int(counts[most])}


def score_of(task: Task, outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return the metric of a network's outputs, NaN where it is not finite: the audit says so and goes on."""
    try:
        return float(task.judge(outputs, targets))
    except NonFinite:
        return math.nan


def shown_inputs(
    task: Task, split: Split, rows: Sequence[Mapping[str, Any]], targets: int
) -> list[dict[str, Any]]:
    """Return the inputs of the first changed examples: index, classes, ``input``, and ``words`` of tokens.

    `rows`: `changed_examples`; `targets`: how many there are per example. Empty for inputs of several arrays, and for
    very large ones.
    """
    inputs = split.inputs
    if not isinstance(inputs, np.ndarray) or inputs.ndim < 2 or inputs[0].size > MOST_NUMBERS:
        return []
    found = {row["index"] // targets: row for row in reversed(rows[: 4 * SHOWN])}
    tokens = inputs.dtype.kind in "iu" and inputs.ndim == 2
    return [
        {
            **row,
            "index": index,
            "input": inputs[index].tolist() if tokens else _rounded(inputs[index]),
            "words": task.text_of(inputs[index]) if tokens else None,
        }
        for index, row in list(reversed(found.items()))[:SHOWN]
    ]


def _rounded(values: np.ndarray) -> Any:
    wide = values.astype(np.float64)
    return np.where(np.isfinite(wide), np.round(wide, 4), 0.0).tolist()
