"""What a clip or a bound did, in one object; making it costs nothing, reading it may compute."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from niwaki.rule import Array


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened in one step: norms before and after, factor, action, and who contributed.

    `names`: of the tensors. `norms`: one number per tensor before the step, the L2 norm, or for
    rules of element scope the largest magnitude. `after`: the same number after it. `skipped`:
    whether no step was (or is to be) taken. `left_alone`: name -> reason for tensors not touched.
    `share_at_bound`: for bounds, the share of units (or entries) that stand at the limit.
    """

    names: tuple[str, ...]
    norms: Array
    after: Array
    skipped: bool
    element_wise: bool = False
    nonfinite_policy: str = "skip"
    left_alone: dict[str, str] = field(default_factory=dict)
    share_at_bound: float | None = None

    @property
    def pre(self) -> float:
        """The joint norm before: L2 over all tensors, or the largest magnitude for element scope."""
        return self._joint(self.norms)

    @property
    def post(self) -> float:
        """The joint norm after clipping; 0 for a skipped step."""
        return 0.0 if self.skipped else self._joint(self.after)

    @property
    def factor(self) -> float:
        """Joint norm after / before, of the tensors with finite norms: 1 if none of them was clipped."""
        if self.skipped:
            return 0.0
        norms = np.asarray(self.norms, dtype=np.float64)
        finite = np.isfinite(norms)
        before = self._joint(norms[finite])
        return self._joint(np.asarray(self.after)[finite]) / before if before > 0.0 else 1.0

    @property
    def engaged(self) -> bool:
        """Whether any tensor was changed by the rule; a skipped step changes none."""
        if self.skipped:
            return False
        norms = np.asarray(self.norms, dtype=np.float64)
        return bool(np.any((np.asarray(self.after) < norms) & np.isfinite(norms)))

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """The names of the tensors with non-finite entries."""
        return tuple(name for name, norm in self._pairs(self.norms) if not math.isfinite(norm))

    @property
    def action(self) -> str:
        """One of ``kept``, ``clipped``, ``skipped``, ``zeroed`` (non-finite tensors set to zero), ``passed``."""
        if self.skipped:
            return "skipped"
        if self.nonfinite:
            return "zeroed" if self.nonfinite_policy == "zero" else "passed"
        return "clipped" if self.engaged else "kept"

    def top(self, most: int = 3) -> list[tuple[str, float]]:
        """Return the largest contributors as ``(name, share of the squared joint norm)``.

        For rules of element scope there is no joint norm: ``(name, largest magnitude)``.
        """
        finite = [(name, norm) for name, norm in self._pairs(self.norms) if math.isfinite(norm)]
        largest = max((norm for _, norm in finite), default=0.0)
        if largest == 0.0:
            return []
        if self.element_wise:
            return sorted(finite, key=lambda pair: (-pair[1], pair[0]))[:most]
        squares = [(name, (norm / largest) ** 2) for name, norm in finite]
        total = sum(square for _, square in squares)
        ranked = sorted(squares, key=lambda pair: (-pair[1], pair[0]))
        return [(name, square / total) for name, square in ranked[:most]]

    def as_row(self) -> dict[str, Any]:
        """Return the facts that a record keeps of every step."""
        return {
            "norm": self.pre if math.isfinite(self.pre) else None,
            "factor": self.factor,
            "clipped": self.engaged,
            "skipped": self.skipped,
            **({"nonfinite": list(self.nonfinite[:8])} if self.nonfinite else {}),
        }

    def __str__(self) -> str:
        if self.nonfinite:
            culprits = ", ".join(self.nonfinite[:3]) + (", ..." if self.nonfinite[3:] else "")
            rest = f"; the others x{self.factor:.3g} clipped" if self.engaged else ""
            return f"{self.action}: non-finite entries in {culprits}{rest}"
        word = "largest" if self.element_wise else "pre"
        text = f"{word} {self.pre:.4g} -> post {self.post:.4g} x{self.factor:.3g} {self.action}"
        share = ".4g" if self.element_wise else ".0%"
        return text + "".join(f"; top: {name} {number:{share}}" for name, number in self.top(1))

    def _pairs(self, numbers: Array) -> list[tuple[str, float]]:
        return list(zip(self.names, np.asarray(numbers, dtype=np.float64).tolist(), strict=True))

    def _joint(self, numbers: Array) -> float:
        values = np.asarray(numbers, dtype=np.float64)
        if values.size == 0:
            return 0.0
        largest = float(np.max(values))
        if self.element_wise or largest == 0.0 or not math.isfinite(largest):
            return largest
        return largest * float(np.sqrt(np.sum(np.square(values / largest))))
