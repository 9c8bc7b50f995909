"""Gradual pruning: how sparse a network is to be at which step of its training."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from karikomi.errors import InvalidArgument
from karikomi.prune.pattern import Pattern
from karikomi.prune.schedules.pruning_schedule import PruningSchedule, settle, settle_span
from karikomi.prune.scores.score import Score
from karikomi.registry import register
from karikomi.schedule import Cubic


@register(
    "prune",
    formula="s(t) = final + (initial - final) * (1 - (t - first) / (last - first))^3",
    source="Zhu and Gupta 2017, To prune, or not to prune",
)
@dataclass(frozen=True, slots=True)
class Gradual(PruningSchedule):
    """Prune while training: fast at first, slower as less is left, and never after `last`.

    ``s(t) = sparsity + (initial - sparsity) * (1 - u)^3`` with u the share of the way from the
    first to the last step. Masks are made at the first step, then `every` so many, and at the last.

    `sparsity`: the final share that is zero, in [0, 1). `steps`: ``(first, last)``, 0 <= first < last.
    `every`: steps between two masks, >= 1. `initial`: the share at the first step, in [0, sparsity]. The
    other fields, and how steps are counted: see `PruningSchedule`. Raises `InvalidArgument` or `UnknownName`.

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
    score: str | Score = "magnitude"
    allocation: str | None = None
    pattern: str | Pattern = "unstructured"
    only: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        settle(self, shares=("sparsity", "initial"), numbers_from={"every": 1})
        settle_span(self)
        if self.initial > self.sparsity:
            raise InvalidArgument(
                "the initial sparsity is above the final one",
                where="Gradual",
                got=self.initial,
                allowed=f"0 to {self.sparsity}",
            )

    def sparsity_at(self, step: int) -> float:
        """Return the share of weights that are to be zero at `step`."""
        return Cubic(self.initial, self.sparsity, steps=self.steps).at(step)

    def due(self, step: int) -> bool:
        """Return whether new masks are made at `step`."""
        first, last = self.steps
        return first <= step <= last and ((step - first) % self.every == 0 or step == last)

    @property
    def last(self) -> int:
        """The step of the last masks."""
        return self.steps[1]
