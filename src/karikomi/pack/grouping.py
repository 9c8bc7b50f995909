"""Which tensors share a payload: large ones stand alone, small ones of a kind are pooled and coded together."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import numpy as np

from karikomi.pack.codecs import adaptive
from karikomi.pack.contest import choose, choose_levels
from karikomi.pack.group_coding import Encoded, written_grids
from karikomi.pack.levels import levels_of
from karikomi.pack.read_budget import Budget
from karikomi.pack.stored import Stored

LARGE = 2**19
"""Elements from which on a tensor stands alone."""
MOST_POOLED = 2**20
"""Elements of a pool: who wants one of its tensors has to decode all of them."""
GROUP_BYTES = 20
"""About what a group takes in the manifest and the checks."""
LEVELS = "levels"
SLOW_LEVELS = Budget().slow
"""Levels of a file that a codec takes one after the other, at most."""

Plan = tuple[list[Stored], Encoded]


class Pools:
    """Collects small tensors; what is returned is encoded, and can be forgotten."""

    def __init__(self) -> None:
        self.waiting: dict[Hashable, list[Stored]] = {}
        self.slow_left = SLOW_LEVELS

    def add(self, stored: Stored) -> Iterator[Plan]:
        """Yield the groups that this tensor completes."""
        if stored.flat.size >= LARGE:
            yield self._counted(_alone(stored, self.slow_left >= stored.flat.size))
            return
        key = _kind(stored)
        pool = self.waiting.setdefault(key, [])
        if sum(other.flat.size for other in pool) + stored.flat.size > MOST_POOLED:
            yield from self._coded(key, self.waiting.pop(key))
            pool = self.waiting.setdefault(key, [])
        pool.append(stored)

    def close(self) -> Iterator[Plan]:
        """Yield what is left."""
        for key in sorted(self.waiting, key=str):
            yield from self._coded(key, self.waiting[key])

    def _coded(self, key: Hashable, tensors: list[Stored]) -> Iterator[Plan]:
        slow = self.slow_left >= sum(stored.flat.size for stored in tensors)
        yield from map(self._counted, _coded(key, tensors, slow))

    def _counted(self, plan: Plan) -> Plan:
        if plan[1].codec == adaptive.NAME:
            self.slow_left -= sum(stored.flat.size for stored in plan[0])
        return plan


def _kind(stored: Stored) -> Hashable:
    """Return the pool of a tensor; the ones of levels may have several types."""
    return stored.flat.dtype.str if levels_of(stored.flat, stored.grid) is None else LEVELS


def _alone(stored: Stored, slow: bool) -> Plan:
    single, levels = choose(stored.flat), choose_levels([stored], slow=slow)
    best = levels if levels is not None and levels.size < single.size else single
    return [stored], best


def _coded(key: Hashable, tensors: list[Stored], slow: bool) -> Iterator[Plan]:
    """Yield the groups of a pool: all together, or each by itself, whichever is smaller."""
    apart = [([stored], choose(stored.flat)) for stored in tensors]
    if key == LEVELS:
        yield from min(_level_plans(apart, slow), key=_size)
        return
    together = [(tensors, choose(np.concatenate([stored.flat for stored in tensors])))]
    yield from min(together, apart, key=_size)


def _level_plans(apart: list[Plan], slow: bool) -> Iterator[list[Plan]]:
    """Yield ways to group tensors of levels: each alone, in one stream, in one stream but for what is smaller alone."""
    yield apart
    tensors = [stored for (stored,), _ in apart]
    pooled = choose_levels(tensors, slow=slow)
    if pooled is None:
        return
    yield [(tensors, pooled)]
    if pooled.codec == adaptive.NAME:
        return
    total = sum(stored.flat.size for stored in tensors)
    alone = [
        item
        for item in apart
        if item[1].size + GROUP_BYTES < pooled.size * item[0][0].flat.size / total
    ]
    names = {item[0][0].name for item in alone}
    rest = [stored for stored in tensors if stored.name not in names]
    smaller = choose_levels(rest, slow=False) if alone and rest else None
    if smaller is not None:
        yield [(rest, smaller), *alone]


def _size(groups: list[Plan]) -> int:
    return sum(
        len(written_grids(tensors)) + encoded.size + GROUP_BYTES + 2 * len(encoded.chunks)
        for tensors, encoded in groups
    )
