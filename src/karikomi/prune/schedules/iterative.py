"""Iterative pruning: rounds that each remove the same share of what is left, with or without rewinding."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from karikomi.errors import InvalidArgument
from karikomi.prune.allocations.allocation import Allocation
from karikomi.prune.pattern import Pattern
from karikomi.prune.schedules.pruning_schedule import PruningSchedule, settle, settle_span
from karikomi.prune.scores.score import Score
from karikomi.registry import register


@register(
    "prune",
    formula="s_k = 1 - (1 - sparsity)^(k / rounds), for round k = 1 .. rounds",
    source="Frankle and Carbin 2019, The Lottery Ticket Hypothesis",
)
@dataclass(frozen=True, slots=True)
class Iterative(PruningSchedule):
    """Prune in rounds, each the same share of what is left; optionally rewind after each of them.

    Round k of n leaves ``(1 - sparsity)^(k / n)`` of the weights, at step
    ``first + (k - 1) (last - first) / (n - 1)``, rounded: the first round at the first step, the last one
    at the last.

    `sparsity`: the final share that is zero, in [0, 1). `steps`: ``(first, last)``, 0 <= first < last.
    `rounds`: 2 to last - first + 1. `rewind`: a step from 0 to first, or none: what the weights,
    the moments of the optimizer and the buffers (running statistics) were after that step, 0 being when
    `attach` was called, they are again after each round, where not masked. The learning rate stays the user's: a
    schedule that restarts at the rounds rewinds it too. The other fields, and how steps are counted: see
    `PruningSchedule`. Raises `InvalidArgument` or `UnknownName`.

    >>> rule = Iterative(0.488, steps=(1_000, 3_000), rounds=3, rewind=100)
    >>> [(step, round(rule.sparsity_at(step), 3)) for step in range(9_999) if rule.due(step)]
    [(1000, 0.2), (2000, 0.36), (3000, 0.488)]

    Source: Frankle and Carbin 2019, "The Lottery Ticket Hypothesis" (rewinding to step 0); Frankle et al.
    2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (to step k).
    """

    sparsity: float
    _: KW_ONLY
    steps: tuple[int, int]
    rounds: int
    rewind: int | None = None
    score: str | Score = "magnitude"
    allocation: Allocation | None = None
    pattern: str | Pattern = "unstructured"
    only: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        rewind = {} if self.rewind is None else {"rewind": 0}
        settle(self, shares=("sparsity",), numbers_from={"rounds": 2, **rewind})
        settle_span(self)
        first, last = self.steps
        if self.rounds > last - first + 1:
            raise InvalidArgument(
                "each round has a step of its own",
                where="Iterative.rounds",
                got=self.rounds,
                allowed=f"2 to {last - first + 1}",
            )
        if self.rewind is not None and self.rewind > first:
            raise InvalidArgument(
                "a rewind goes to a step before the first round",
                where="Iterative.rewind",
                got=self.rewind,
                allowed=f"0 to {first}",
            )

    def due(self, step: int) -> bool:
        """Return whether a round ends at `step`."""
        return step >= self.steps[0] and self._done(step) > self._done(step - 1)

    def sparsity_at(self, step: int) -> float:
        """Return the share that is to be zero at `step`."""
        done = self._done(step)
        if done == self.rounds:
            return self.sparsity
        return 1.0 - (1.0 - self.sparsity) ** (done / self.rounds)

    @property
    def last(self) -> int:
        """The step of the last round."""
        return self.steps[1]

    @property
    def rewinds_to(self) -> int | None:
        """The step whose weights return."""
        return self.rewind

    def _done(self, step: int) -> int:
        """Return how many rounds have ended at `step`: round k ends where k - 1 intervals have passed."""
        first, last = self.steps
        if step < first:
            return 0
        passed = 2 * (min(step, last) - first) + 1
        return min((passed * (self.rounds - 1)) // (2 * (last - first)) + 1, self.rounds)
