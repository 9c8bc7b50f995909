"""The outcome of a clip or a bound; derived values are computed when they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from karikomi.rule import Array


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one step: norms before and after, factor, action, largest contributors.

    `names`: the tensor of each number; for rules per unit the name of a tensor is repeated for each unit.
    `norms`: before the step, L2 norms, or for rules of element scope largest magnitudes. `after`: the
    same numbers after it. `skipped`: whether the step was (or is to be) skipped. `peaks`: tensors with a
    largest magnitude where the others have norms. `earlier`: the outcomes of the stages of a chain
    that were measured before. `left_alone`: name -> reason for tensors that were not changed.
    `share_at_bound`: for bounds, the share of units (or entries) at the limit. `groups`: label and names of
    tensors that had a rule of their own. `order`: the p of the norms.

    The numbers may be on a device; they are copied to the host when a property is read.
    """

    names: tuple[str, ...]
    norms: Array
    after: Array
    skipped: Array
    element_wise: bool = False
    nonfinite_policy: str = "skip"
    left_alone: dict[str, str] = field(default_factory=dict)
    share_at_bound: float | None = None
    peaks: frozenset[str] = frozenset()
    earlier: tuple[Outcome, ...] = ()
    groups: tuple[tuple[str, frozenset[str]], ...] = ()
    order: float = 2.0

    @property
    def pre(self) -> float:
        """The joint norm before: the p-norm over all tensors, or the largest magnitude for element scope.

        Of a chain, the largest of its stages', since a later stage is measured after an earlier one was applied; of
        stages with norms of several orders, of those that have the order of the last.
        """
        stages = [stage for stage in (*self.earlier, self) if stage.order == self.order]
        return float(np.max([stage._joint(stage._numbers(stage.norms)) for stage in stages]))

    @property
    def post(self) -> float:
        """The joint norm after clipping; 0 for a skipped step."""
        return 0.0 if self._skipped() else self._joint(self._numbers(self.after))

    @property
    def factor(self) -> float:
        """Joint norm after / before, of the tensors with finite norms: 1 if none of them was clipped.

        Of a chain that clamps entries somewhere, or has norms of several orders, the product over its stages.
        """
        return self._factor_of(None)

    @property
    def factors(self) -> dict[str, float]:
        """The same for each group of `Groups`, by its glob: the norm of its tensors after / before.

        Of a group with entries clamped, largest magnitudes after / before. Empty for other rules.
        """
        return {label: self._factor_of(names) for label, names in self.groups}

    def _factor_of(self, names: frozenset[str] | None) -> float:
        if self._skipped():
            return 0.0
        stages = (*self.earlier, self)
        sizes = [stage._finite_sizes(names) for stage in stages]
        several = len({stage.order for stage in stages}) > 1
        if several or any(stage.element_wise or stage._by_entry(names) for stage in stages):
            return math.prod(after / before for before, after in sizes if before > 0.0)
        before = max(before for before, _ in sizes)
        return sizes[-1][1] / before if before > 0.0 else 1.0

    def _finite_sizes(self, names: frozenset[str] | None) -> tuple[float, float]:
        """Return the joint norms before and after, of these tensors (``None``: all) with finite norms."""
        norms, after = self._numbers(self.norms), self._numbers(self.after)
        chosen, joint = np.isfinite(norms), self._joint
        if names is not None:
            chosen &= np.array([name in names for name in self.names], dtype=bool)
            if self._by_entry(names):
                joint = lambda values: float(np.max(values, initial=0.0))  # noqa: E731
        before, then = (joint(np.where(chosen, values, 0.0)) for values in (norms, after))
        return before, then

    def _by_entry(self, names: frozenset[str] | None) -> bool:
        """Return whether these tensors have largest magnitudes here, and no norms."""
        return names is not None and names <= self.peaks

    @property
    def engaged(self) -> bool:
        """Whether any tensor was changed by the rule; false for a skipped step."""
        if self._skipped():
            return False
        norms = self._numbers(self.norms)
        changed = bool(np.any((self._numbers(self.after) != norms) & np.isfinite(norms)))
        return changed or any(stage.engaged for stage in self.earlier)

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """The names of the tensors with non-finite entries."""
        if not self.earlier and bool(np.all(np.isfinite(self._numbers(self.norms)))):
            return ()
        own = (name for name, norm in self.tensors().items() if not math.isfinite(norm))
        return tuple(dict.fromkeys([*(n for stage in self.earlier for n in stage.nonfinite), *own]))

    @property
    def action(self) -> str:
        """One of ``kept``, ``clipped``, ``skipped``, ``zeroed`` (bad tensors or entries set to zero), ``passed``."""
        if self._skipped():
            return "skipped"
        if self.nonfinite:
            return "zeroed" if self.nonfinite_policy.startswith("zero") else "passed"
        return "clipped" if self.engaged else "kept"

    def top(self, most: int = 3) -> list[tuple[str, float]]:
        """Return the largest contributors as ``(name, share of the squared joint norm)``, or of its p-th power.

        For rules of element scope, and for infinite p, there are no shares: ``(name, largest magnitude)``.
        """
        finite = [
            (name, norm)
            for name, norm in self.tensors().items()
            if math.isfinite(norm) and (self.element_wise or name not in self.peaks)
        ]
        largest = max((norm for _, norm in finite), default=0.0)
        if largest == 0.0:
            return []
        if self._by_magnitude:
            return sorted(finite, key=lambda pair: (-pair[1], pair[0]))[:most]
        powers = [(name, (norm / largest) ** self.order) for name, norm in finite]
        total = sum(power for _, power in powers)
        ranked = sorted(powers, key=lambda pair: (-pair[1], pair[0]))
        return [(name, power / total) for name, power in ranked[:most]]

    def tensors(self) -> dict[str, float]:
        """Return name -> the number before, joint over the units of a tensor."""
        numbers = self._numbers(self.norms)
        if len(set(self.names)) == len(self.names):
            return dict(zip(self.names, numbers.tolist(), strict=True))
        parts: dict[str, list[float]] = {}
        for name, number in zip(self.names, numbers.tolist(), strict=True):
            parts.setdefault(name, []).append(number)
        return {name: self._largest_or_joint(np.array(part)) for name, part in parts.items()}

    def as_row(self) -> dict[str, Any]:
        """Return the facts that are recorded for every step."""
        norm, nonfinite = self.pre, self.nonfinite
        # JSON has no infinity.
        order = "inf" if math.isinf(self.norm_order) else self.norm_order
        return {
            "norm": norm if math.isfinite(norm) else None,
            **({} if order == 2.0 else {"norm_order": order}),
            "factor": self.factor,
            "clipped": self.engaged,
            "skipped": self._skipped(),
            **({"nonfinite": list(nonfinite[:8])} if nonfinite else {}),
        }

    def __str__(self) -> str:
        if self.nonfinite:
            culprits = ", ".join(self.nonfinite[:3]) + (", ..." if self.nonfinite[3:] else "")
            rest = f"; the others x{self.factor:.3g} clipped" if self.engaged else ""
            return f"{self.action}: non-finite entries in {culprits}{rest}"
        if self.earlier:
            stages = (*(replace(item, earlier=()) for item in (*self.earlier, self)),)
            return "; then ".join(map(str, stages))
        word = "largest" if self.element_wise else "pre"
        text = f"{word} {self.pre:.4g} -> post {self.post:.4g} x{self.factor:.3g} {self.action}"
        share = ".4g" if self._by_magnitude else ".0%"
        top = "".join(f"; top: {name} {number:{share}}" for name, number in self.top(1))
        return text + top

    @property
    def norm_order(self) -> float:
        """The p of `pre`: 2 unless the rule has another, infinite where largest magnitudes are measured."""
        stages = [stage for stage in (*self.earlier, self) if stage.order == self.order]
        return math.inf if all(stage._by_magnitude for stage in stages) else self.order

    @property
    def _by_magnitude(self) -> bool:
        return self.element_wise or math.isinf(self.order)

    def _skipped(self) -> bool:
        return bool(np.asarray(self.skipped))

    def _numbers(self, numbers: Array) -> np.ndarray:
        return np.asarray(numbers, dtype=np.float64)

    def _joint(self, values: np.ndarray) -> float:
        if self.peaks and not self.element_wise:
            values = values[[name not in self.peaks for name in self.names]]
        return self._largest_or_joint(values)

    def _largest_or_joint(self, values: np.ndarray) -> float:
        if values.size == 0:
            return 0.0
        largest = float(np.max(values))
        if self._by_magnitude or largest == 0.0 or not math.isfinite(largest):
            return largest
        ratios = values / largest
        if self.order == 2.0:
            return largest * float(np.sqrt(np.sum(np.square(ratios))))
        return largest * float(np.sum(ratios**self.order)) ** (1.0 / self.order)
