"""Dynamic sparse training: sparse from the first step on, the smallest weights moved elsewhere as it goes."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

from karikomi import registry
from karikomi.prune.allocations.allocation import Allocation
from karikomi.prune.schedules.pruning_schedule import PruningSchedule, settle
from karikomi.prune.scores.score import Score, as_score
from karikomi.registry import register


@dataclass(frozen=True, slots=True)
class _Dynamic(PruningSchedule):
    """What SET and RigL share: their fields, when they move weights, and that the sparsity stays."""

    sparsity: float
    _: KW_ONLY
    until: int
    every: int = 100
    drop: float = 0.3
    score: str | Score = "random"
    allocation: Allocation | None = "erk"
    seed: int = 0
    only: str | tuple[str, ...] | None = None
    exclude: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        least = {"until": 1, "every": 1, "seed": 0}
        settle(self, shares=("sparsity", "drop"), numbers_from=least)

    @property
    def pattern(self) -> str:
        """Single weights: nothing else regrows."""
        return "unstructured"

    def due(self, step: int) -> bool:
        """Return whether the first masks are made, or weights moved, at `step`."""
        return 0 <= step < self.until and step % self.every == 0

    def scored_by(self) -> Score:
        """Return the score of the first masks: random by the schedule's own seed, if not given as an object."""
        if self.score == "random":
            return registry.find("score", "random")(seed=self.seed)
        return as_score(self.score)

    def sparsity_at(self, step: int) -> float:
        """Return the sparsity, which is the same at every step."""
        return self.sparsity

    @property
    def last(self) -> int:
        """The last step at which weights may move."""
        return self.until - 1


@register(
    "prune",
    formula="each `every` steps: drop the smallest |w|, regrow as many at random, per tensor",
    source="Mocanu et al. 2018, Scalable training of artificial neural networks with adaptive sparse connectivity",
)
@dataclass(frozen=True, slots=True)
class SET(_Dynamic):
    """Sparse evolutionary training: the smallest weights of each tensor move to random places.

    At each multiple of `every` below `until`: of the n kept weights of a tensor the ``floor(drop * n)``
    smallest ``|w|`` are dropped, and as many of the masked ones kept, drawn uniformly by (seed, step,
    name). They begin at zero, their moments too; one that is dropped and drawn at once stays as it is.

    `sparsity`: the share that is zero throughout, in [0, 1). `until`: the step from which masks stay.
    `every`: >= 1. `drop`: in [0, 1). `score`, `allocation`: of the first masks, made after the first
    step unless ``handle.masks`` is set by then; random, by the `seed`. `only`, `exclude`: see
    `PruningSchedule`. Raises `InvalidArgument` or `UnknownName`.

    >>> rule = SET(0.9, until=1_000)
    >>> [step for step in range(1_200) if rule.due(step)][-1], rule.drop_at(100), rule.regrows_by
    (900, 0.3, 'noise')

    Source: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science". Deviations, as in Evci et al. 2020: the smallest
    magnitude and not the smallest of each sign; new weights begin at zero.
    """

    @property
    def regrows_by(self) -> str | None:
        """By chance."""
        return "noise"

    def drop_at(self, step: int) -> float:
        """Return `drop`."""
        return self.drop


@register(
    "prune",
    formula="each `every` steps: drop the smallest |w|, regrow the largest |gradient|, per tensor; "
    "share drop / 2 (1 + cos(pi t / until))",
    source="Evci et al. 2020, Rigging the Lottery: Making All Tickets Winners",
)
@dataclass(frozen=True, slots=True)
class RigL(_Dynamic):
    """The rigged lottery: the smallest weights of each tensor move to where the gradient is largest.

    At each multiple of `every` below `until`: of the n kept weights of a tensor the ``floor(f(t) n)``
    smallest ``|w|`` are dropped, with ``f(t) = drop / 2 (1 + cos(pi t / until))``, and as many kept whose
    ``|dL/dw|`` in this step, masked ones included, is largest. They begin at zero, their moments too;
    one that is dropped and chosen at once stays as it is.

    `sparsity`: the share that is zero throughout, in [0, 1). `until`: the step from which masks stay,
    three quarters of the training in the paper. `every`: >= 1. `drop`: in [0, 1). `score`,
    `allocation`: of the first masks, made after the first step unless ``handle.masks`` is set by then;
    random, by the `seed`. `only`, `exclude`: see `PruningSchedule`. Raises `InvalidArgument` or `UnknownName`.

    >>> rule = RigL(0.9, until=1_000)
    >>> [round(rule.drop_at(step), 3) for step in (0, 500, 1_000)], rule.regrows_by
    ([0.3, 0.15, 0.0], 'gradient')

    Source: Evci et al. 2020, "Rigging the Lottery: Making All Tickets Winners", algorithm 1.
    """

    @property
    def regrows_by(self) -> str | None:
        """By the gradient."""
        return "gradient"

    def drop_at(self, step: int) -> float:
        """Return the share at `step`, which falls to 0 at `until`."""
        return self.drop / 2.0 * (1.0 + math.cos(math.pi * step / self.until))
