"""The Pareto front: the candidates that no other candidate equals or betters in everything."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def front(items: Sequence[T], costs: Callable[[T], Sequence[float]]) -> list[T]:
    """Return the items that are not dominated, by rising first cost; lower is better in each.

    An item is dominated by one that is nowhere worse and somewhere better; of several with equal costs the first
    stays. Items with a cost that is NaN are left out.

    >>> front([(1, 5), (2, 2), (3, 3), (2, 2)], lambda item: item)
    [(1, 5), (2, 2)]
    """
    rows = [(tuple(costs(item)), place) for place, item in enumerate(items)]
    rows = sorted(row for row in rows if not any(map(math.isnan, row[0])))
    kept: list[tuple[tuple[float, ...], int]] = []
    for cost, place in rows:
        # Sorted, so that only what stands before can dominate.
        if not any(all(a <= b for a, b in zip(k, cost, strict=True)) for k, _ in kept):
            kept.append((cost, place))
    return [items[place] for _, place in kept]
