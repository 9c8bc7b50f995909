"""Budgets in any combination: what holds, which limit binds, and the nearest budget that can be met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from karikomi.errors import check

OBJECTIVES = ("bytes", "ms", "macs", "parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Upper limits of a candidate's facts; None is no limit.

    `max_drop`: by how much the metric may get worse, in its own unit, >= 0. `max_ms`: milliseconds of one batch by
    the latency table. `max_macs`, `max_parameters`, `max_bytes`: of the network, and of the file. `objective`: what is
    made small among all that hold; by default the first of bytes, ms, macs and parameters without a limit, and the
    drop where it has none.

    >>> budgets = Budgets(max_drop=0.25, max_bytes=1000)
    >>> budgets.objective_name, budgets.misses({"drop": 0.75, "bytes": 900})
    ('ms', {'drop': 2.0})
    """

    max_drop: float | None = None
    max_ms: float | None = None
    max_macs: float | None = None
    max_parameters: float | None = None
    max_bytes: float | None = None
    objective: str | None = None

    def __post_init__(self) -> None:
        for name, limit in self.limits.items():
            good = isinstance(limit, Real) and not isinstance(limit, bool) and math.isfinite(limit)
            least = good and (limit >= 0 if name == "drop" else limit > 0)
            allowed = ">= 0" if name == "drop" else "> 0"
            check("compress", (least, f"max_{name} must be {allowed}", limit, allowed))
        known = self.objective in (None, "drop", *OBJECTIVES)
        check("compress", (known, "unknown objective", self.objective, f"drop, {OBJECTIVES}"))

    @property
    def limits(self) -> dict[str, float]:
        """Fact -> its limit, of those that have one."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "objective"}
        return {name[4:]: limit for name, limit in values.items() if limit is not None}

    @property
    def objective_name(self) -> str:
        """The fact that is made small."""
        if self.objective is not None:
            return self.objective
        if self.max_drop is None:
            return "drop"
        return next((name for name in OBJECTIVES if name not in self.limits), "bytes")

    def misses(self, facts: Mapping[str, Any]) -> dict[str, float]:
        """Return fact -> by which share it is above its limit; a fact that is missing or NaN misses by infinity."""
        found = {name: _excess(facts.get(name), limit) for name, limit in self.limits.items()}
        return {name: excess for name, excess in found.items() if excess > 0}

    def rank(self, facts: Mapping[str, Any]) -> tuple[float, ...]:
        """Return what candidates are sorted by: the largest miss, then the objective, the bytes and the drop."""
        worst = max(self.misses(facts).values(), default=0.0)
        # Networks of one form are equally fast.
        return worst, *(_number(facts.get(k)) for k in (self.objective_name, "bytes", "drop"))

    def judge(self, candidates: Sequence[Mapping[str, Any]]) -> Judgement:
        """Return the best of the candidates' facts, and where none holds the binding limit and the nearest budgets."""
        check("compress", (candidates, "there are no candidates", 0, ">= 1"))
        best = min(range(len(candidates)), key=lambda k: (self.rank(candidates[k]), k))
        misses = self.misses(candidates[best])
        if not misses:
            return Judgement(best, True, None, [])
        binding = max(misses, key=lambda name: misses[name])
        return Judgement(best, False, binding, self._nearest(candidates))

    def _nearest(self, candidates: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
        """Return the budgets with one limit relaxed, to what a candidate reaches that keeps all others."""
        found = []
        for relaxed in self.limits:
            reached = [
                _number(facts.get(relaxed))
                for facts in candidates
                if not set(self.misses(facts)) - {relaxed}
            ]
            if reached and math.isfinite(min(reached)):
                found.append({**self.limits, relaxed: min(reached)})
        return found


@dataclass(frozen=True, slots=True)
class Judgement:
    """`best`: the place of the best candidate; whether it `held`; the `binding` limit, and the `nearest` budgets."""

    best: int
    held: bool
    binding: str | None
    nearest: list[dict[str, float]]


def _number(value: Any) -> float:
    known = isinstance(value, Real) and not math.isnan(value)
    return float(value) if known else math.inf


def _excess(value: Any, limit: float) -> float:
    number = _number(value)
    # The rounding of a difference of two shares is no miss.
    if number <= limit + 1e-12 * max(abs(limit), 1.0):
        return 0.0
    return (number - limit) / limit if limit else math.inf
