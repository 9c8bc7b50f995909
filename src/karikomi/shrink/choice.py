"""Which units go: one target, a score, an allocation, limits, and the tensors that may lose units."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from karikomi.errors import Unsupported, check_known
from karikomi.prune import as_score
from karikomi.prune.scores.score import Score
from karikomi.prune.target import SHARES, Target, target_of
from karikomi.schedule import whole_from
from karikomi.select import select
from karikomi.shrink.labels import Block, Classes
from karikomi.shrink.unit_groups import ALLOCATIONS, Group, kept_of, to_budget

STEPS, MEASURED_STEPS = 24, 7
"""Bisections of a budget; a measured one takes seconds for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How units are chosen, checked; `where` is the public function, for errors."""

    where: str
    target: Target
    score: Score
    allocation: str = "uniform"
    multiple: int = 1
    least: int = 1
    data: Iterable[Any] | None = None
    loss: Any = None
    only: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None

    @property
    def whole(self) -> bool:
        """Whether whole heads and groups go instead of their inner units."""
        return self.target.unit == "heads"

    def free(
        self,
        groups: Sequence[Group],
        names: Collection[str],
        makes: Callable[[Block], bool],
        frozen: Mapping[str, str],
    ) -> list[Group]:
        """Return the groups of which units may go: several units, made by selected tensors alone.

        `names`: the tensors to which `only` and `exclude` refer. `makes`: whether the indices of an axis are units
        that its tensor makes; what merely reads units, or scales and shifts them, need not be selected. `frozen`:
        layer -> why none of its units can go. Raises `Unsupported` where no group is left.
        """
        picked = set(select(list(names), only=self.only, exclude=self.exclude, where=self.where))
        free = []
        for group in groups:
            owners = [block for block, _ in group.members if block.owner in names]
            makers = [block for block in owners if makes(block)] or owners
            if len(group) > 1 and owners and all(block.owner in picked for block in makers):
                free.append(group)
        if not free:
            reasons = [f"{name}: {why}" for name, why in frozen.items()]
            raise Unsupported(
                "no unit can go",
                where=self.where,
                got="; ".join(reasons[:3]) or "no layer",
                allowed="units that are no outputs, of layers that only= and exclude= leave",
            )
        return free

    def kept(
        self,
        classes: Classes,
        groups: Sequence[Group],
        scores: Sequence[np.ndarray],
        cost: Callable[[float, np.ndarray], float],
    ) -> np.ndarray:
        """Return a boolean per label: whether it stays.

        `scores`: one per unit of each group. `cost`: of a share of units and the labels that stay, in the unit of
        the target; called for budgets only.
        """
        allocate = ALLOCATIONS[self.allocation]

        def stays(share: float) -> np.ndarray:
            gone = allocate(groups, scores, share, self.multiple, self.least)
            return kept_of(classes, gone)

        def costs(share: float) -> float:
            return cost(share, stays(share))

        unit, value = self.target.unit, self.target.value
        if unit in SHARES:
            return stays(value)
        budget = (
            value if self.target.absolute else value * cost(1.0, np.ones(len(classes.roots), bool))
        )
        steps = MEASURED_STEPS if unit == "ms" else STEPS
        return stays(to_budget(costs, budget, unit=unit, steps=steps, where=self.where))


def choice_of(
    targets: Mapping[str, float | None],
    *,
    where: str,
    score: str | Score,
    allocation: str,
    multiple_of: int,
    least: int,
    **options: Any,
) -> Choice:
    """Return the choice of a user's arguments; raises `InvalidArgument` for what has no or two readings.

    >>> choice_of({"width": 0.5, "macs": None}, where="shrink", score="magnitude", allocation="uniform",
    ...           multiple_of=8, least=1).target
    Target(unit='width', value=0.5)
    """
    check_known(allocation, ALLOCATIONS, "unknown allocation", where=where)
    return Choice(
        where=where,
        target=target_of(where=where, **targets),
        score=as_score(score),
        allocation=allocation,
        multiple=whole_from(
            1, multiple_of, "units stay in multiples of this", where=f"{where}: multiple_of"
        ),
        least=whole_from(1, least, "so many units stay", where=f"{where}: least"),
        **options,
    )
