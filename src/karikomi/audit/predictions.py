"""Comparison of predicted classes: accuracy per class, and changed examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

LISTED = 20
"""Changed examples that a result lists; the others are only counted."""


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
        return [
            {"class": str(name), "examples": int(count), "before": float(b), "after": float(a)}
            for name, count, b, a in zip(names, counts, *shares, strict=True)
        ]

    def _example(self, index: int) -> dict[str, Any]:
        classes = {"label": self.targets, "before": self.before, "after": self.after}
        place = index if self.places is None else int(self.places[index])
        return {"index": place, **{key: str(value[index]) for key, value in classes.items()}}
