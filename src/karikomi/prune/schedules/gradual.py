"""Gradual pruning: how sparse a network is to be at which step of its training."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

from karikomi.errors import InvalidArgument
from karikomi.prune.allocations.allocation import Allocation
from karikomi.prune.pattern import Pattern
from karikomi.prune.schedules.pruning_schedule import PruningSchedule, settle, settle_span
from karikomi.prune.scores.score import Score
from karikomi.registry import register
from karikomi.schedule import is_number


@register(
    "prune",
    formula="s(t) = final + (initial - final) * (1 - (t - first) / (last - first))^power, power 3",
    source="Zhu and Gupta 2017, To prune, or not to prune",
)
@dataclass(frozen=True, slots=True)
class Gradual(PruningSchedule):
    """Prune while training: fast at first, slower as less is left, and never after `last`.

    ``s(t) = sparsity + (initial - sparsity) * (1 - u)^power`` with u the share of the way from the
    first to the last step. Masks are made at the first step, then `every` so many, and at the last.

    `sparsity`: the final share that is zero, in [0, 1). `steps`: ``(first, last)``, 0 <= first < last.
    `every`: steps between two masks, >= 1. `initial`: the share at the first step, in [0, 1). Equal to `sparsity`, it
    is constant; above it, masks are made anew each time, and weights come back, at zero, by the score (of equal ones
    the last). `power`: > 0. `begin`, `end`: the first and the last step at which masks are made, where those are not
    the ends of `steps`; 0 <= begin <= end. The other fields, and how steps are counted: see `PruningSchedule`. Raises
    `InvalidArgument` or `UnknownName`.

    >>> rule = Gradual(0.8, steps=(0, 400))
    >>> [round(rule.sparsity_at(step), 3) for step in (0, 100, 200, 400)]
    [0.0, 0.463, 0.7, 0.8]
    >>> [step for step in range(600) if rule.due(step)]
    [0, 100, 200, 300, 400]

    Source: Zhu and Gupta 2017, "To prune, or not to prune", eq. 1, exponent 3.
    """

    sparsity: float
    _: KW_ONLY
    steps: tuple[int, int]
    every: int = 100
    initial: float = 0.0
    power: float = 3.0
    begin: int | None = None
    end: int | None = None
    score: str | Score = "magnitude"
    allocation: Allocation | None = None
    pattern: str | Pattern = "unstructured"
    only: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        ends = {field: 0 for field in ("begin", "end") if getattr(self, field) is not None}
        settle(self, shares=("sparsity", "initial"), numbers_from={"every": 1, **ends})
        settle_span(self)
        first, last = self._window
        if not first <= last:
            raise InvalidArgument(
                "masks are made from begin to end",
                where="Gradual",
                got=f"begin={first}, end={last}",
                allowed="begin <= end",
            )
        if not is_number(self.power) or not 0.0 < self.power < math.inf:
            raise InvalidArgument(
                "the exponent is a positive number",
                where="Gradual.power",
                got=repr(self.power),
                allowed="> 0",
            )
        object.__setattr__(self, "power", float(self.power))

    def sparsity_at(self, step: int) -> float:
        """Return the share of weights that are to be zero at `step`."""
        first, last = self.steps
        rest = 1.0 - min(max((step - first) / (last - first), 0.0), 1.0)
        return self.sparsity + (self.initial - self.sparsity) * rest**self.power

    def due(self, step: int) -> bool:
        """Return whether new masks are made at `step`."""
        first, last = self._window
        return first <= step <= last and ((step - first) % self.every == 0 or step == last)

    @property
    def last(self) -> int:
        """The step of the last masks."""
        return self._window[1]

    @property
    def from_all(self) -> bool:
        """Whether the sparsity falls, so that weights come back."""
        return self.initial > self.sparsity

    @property
    def _window(self) -> tuple[int, int]:
        first, last = self.steps
        return first if self.begin is None else self.begin, last if self.end is None else self.end
