"""The few candidates that are worth a certificate, from safe to bold, by figures of the search split alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from karikomi.errors import check


@dataclass(frozen=True, slots=True)
class Found:
    """A candidate of the search: its name, its cost (lower is better), its drop and the bound on it there."""

    name: str
    cost: float
    drop: float
    bound: float


def handful(found: Sequence[Found], *, max_drop: float, most: int = 5) -> list[Found]:
    """Return at most `most` candidates within the budget on the search split, from safe to bold.

    Safe is a low bound on the search split; of two, a bolder one stands behind only if it costs less. The
    boldest, the cheapest that holds, is always the last; the others are spread evenly between it and the safest.
    Between two of them stands the safest of those whose cost is between, where its bound is within the budget: what
    chance put behind the bolder one on the search split is what to fall back to.

    >>> seen = [Found("a", 10, 0.0, 0.002), Found("b", 4, 0.001, 0.004), Found("c", 7, 0.002, 0.006),
    ...         Found("d", 1, 0.2, 0.3)]
    >>> [item.name for item in handful(seen, max_drop=0.005)]
    ['a', 'b']
    """
    check("handful", (most >= 1, "most is a number of candidates", most, ">= 1"))
    holding = [item for item in found if math.isfinite(item.bound) and item.drop <= max_drop]
    front: list[Found] = []
    for item in sorted(holding, key=lambda item: (item.bound, item.cost, item.name)):
        if not front or item.cost < front[-1].cost:
            front.append(item)
    if len(front) < most:
        front = _with_steps(front, holding, max_drop)
    if len(front) <= most:
        return front
    if most == 1:
        return front[-1:]
    places = {round(k * (len(front) - 1) / (most - 1)) for k in range(most)}
    return [front[place] for place in sorted(places)]


def _with_steps(front: Sequence[Found], holding: Sequence[Found], max_drop: float) -> list[Found]:
    """Return the front with the safest candidate between each two neighbours, by cost.

    Before the first stands the costliest of those that the search split does not tell apart from it.
    """
    alike = [item for item in holding if front and item.bound <= front[0].bound]
    first = max(alike, key=lambda item: item.cost, default=None)
    found = [] if first is None or first.cost <= front[0].cost else [first]
    found += front[:1]
    for safe, bold in itertools.pairwise(front):
        between = [item for item in holding if bold.cost < item.cost < safe.cost]
        step = min(between, key=lambda item: (item.bound, item.cost, item.name), default=None)
        found += [step] if step is not None and step.bound <= max_drop else []
        found.append(bold)
    return found
