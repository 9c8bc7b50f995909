"""A summary of the steps of a training: counts, the median norm, and the largest contributors."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from statistics import median
from typing import Any

from karikomi.rules.decide import leaves
from karikomi.rules.outcome import Outcome

OFTEN = 0.95
"""The share of clipped ones among the steps taken, above which a limit clips more than explosions."""


class Tally:
    """Counts over steps; eight bytes a step."""

    def __init__(self) -> None:
        self.steps = self.clipped = self.skipped = 0
        self._norms = array("d")
        self._leaders: Counter[str] = Counter()
        self._element_wise = False
        self._largest: tuple[float, str, int] | None = None

    def add(self, outcome: Outcome, step: int | None = None) -> None:
        """Count one step; `step`: its number, by default the number of steps so far."""
        row = outcome.as_row()
        self.steps += 1
        self.clipped += row["clipped"]
        self.skipped += row["skipped"]
        self._element_wise = outcome.element_wise
        if row["norm"] is not None:
            self._norms.append(row["norm"])
            for name, _ in outcome.top(1):
                self._leaders[name] += 1
                norm = outcome.tensors()[name]
                if self._largest is None or norm > self._largest[0]:
                    self._largest = norm, name, self.steps if step is None else step

    @property
    def share_clipped(self) -> float:
        """The share of the steps that was clipped."""
        return self.clipped / max(self.steps, 1)

    @property
    def norm(self) -> float:
        """The median of the finite norms before clipping; NaN if there is none."""
        return median(self._norms) if self._norms else math.nan

    def lines(self, rule: Any = None) -> list[str]:
        """Return two lines of text; `rule`: the rule that clipped, for a remark on its limit."""
        if not self.steps:
            return ["karikomi: no step was taken"]
        number = "largest gradient entry" if self._element_wise else "gradient norm"
        usual = f"; median {number} {self.norm:.4g}" if self._norms else ""
        said = [*self._leader(), *self._limit(rule)]
        return [
            f"karikomi: {self.steps:,} steps, {self.clipped:,} clipped ({self.share_clipped:.1%}), "
            f"{self.skipped:,} skipped{usual}",
            f"karikomi: {'; '.join(said) or 'every gradient was zero or not finite'}",
        ]

    def _leader(self) -> list[str]:
        if not self._leaders:
            return []
        name, times = self._leaders.most_common(1)[0]
        said = [f"{name} contributed most in {times / len(self._norms):.0%} of them"]
        if self._largest is not None:
            norm, name, step = self._largest
            said.append(f"the largest of a tensor was {norm:.4g}, of {name} in step {step:,}")
        return said

    def _limit(self, rule: Any) -> list[str]:
        by_design = rule is not None and any(_by_design(leaf) for leaf in leaves(rule))
        taken = self.steps - self.skipped
        if by_design or not taken:
            return []
        if not self.clipped:
            return ["the limit was never met"]
        if self.clipped / taken > OFTEN:
            return ["the limit was met nearly always, so it sets the length of the steps"]
        return []


def _by_design(rule: Any) -> bool:
    # A rule that chooses its own share of clipped steps, or an infinite limit that is there to measure.
    return getattr(rule, "by_design", False) or getattr(rule, "limit", None) == math.inf
