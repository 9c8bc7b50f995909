"""The simplest schedule of pruning: everything at one step."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from karikomi.errors import InvalidArgument
from karikomi.prune.allocations.allocation import Allocation
from karikomi.prune.pattern import Pattern, as_pattern
from karikomi.prune.schedules.pruning_schedule import PruningSchedule, settle
from karikomi.prune.scores.score import Score
from karikomi.registry import register


@register(
    "prune",
    formula="s(t) = sparsity from `step` on",
    source="Han, Pool, Tran and Dally 2015, Learning both Weights and Connections",
)
@dataclass(frozen=True, slots=True)
class OneShot(PruningSchedule):
    """Prune once, at one step, and train on with the masks.

    ``s(t) = sparsity if t >= step else 0``. `sparsity`: the share that goes, in [0, 1). `step`: a whole
    number >= 0; 0 is after the first step. The other fields: see `PruningSchedule`. A pattern that determines
    how much is removed (`NofM`) needs its own sparsity here. Raises `InvalidArgument` or `UnknownName`.

    >>> rule = OneShot(0.9, step=100)
    >>> rule.sparsity_at(99), rule.sparsity_at(100), rule.due(100), rule.due(101)
    (0.0, 0.9, True, False)

    Source: Han, Pool, Tran and Dally 2015, "Learning both Weights and Connections for Efficient Neural
    Networks" (prune, then train on).
    """

    sparsity: float
    step: int = 0
    _: KW_ONLY
    score: str | Score = "magnitude"
    allocation: Allocation | None = None
    pattern: str | Pattern = "unstructured"
    only: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        settle(self, shares=("sparsity",), numbers_from={"step": 0})
        own: Any = as_pattern(self.pattern)
        if own.fixed_share and own.sparsity != self.sparsity:
            raise InvalidArgument(
                "the pattern determines how much is removed",
                where="OneShot.sparsity",
                got=self.sparsity,
                allowed=own.sparsity,
            )

    def due(self, step: int) -> bool:
        """Return whether this is the step."""
        return step == self.step

    def sparsity_at(self, step: int) -> float:
        """Return the share that is to be zero at `step`."""
        return self.sparsity if step >= self.step else 0.0

    @property
    def last(self) -> int:
        """The one step."""
        return self.step
