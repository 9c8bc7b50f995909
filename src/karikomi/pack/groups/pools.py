"""Which tensors share a payload: large ones stand alone, small ones of a kind are pooled and coded together."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Iterator
from dataclasses import replace

import numpy as np

from karikomi.pack.codecs import adaptive
from karikomi.pack.groups.coding import Encoded, written_grids
from karikomi.pack.groups.contest import choose, choose_levels, shannon
from karikomi.pack.groups.levels import levels_of
from karikomi.pack.read_budget import Budget
from karikomi.pack.stored import Stored

LARGE, LARGE_PLAIN = 2**19, 2**12
"""Elements from which on a tensor stands alone: one of levels, and any other."""
MOST_POOLED = 2**20
"""Elements of a pool: who wants one of its tensors has to decode all of them."""
GROUP_BYTES = 20
"""About what a group takes in the manifest and the checks."""
LEVELS = "levels"
SLOW_LEVELS = Budget().slow
"""Levels of a file that a codec takes one after the other, at most."""

NEAR, NEAR_BYTES = 1.01, 32
"""An encoding that is as near to the order-0 bound is taken without looking at others."""
SAMPLE, REPEATED = 2**16, 0.8

Plan = tuple[list[Stored], Encoded]


class Pools:
    """Collects small tensors; what is returned is encoded, and can be forgotten."""

    def __init__(self) -> None:
        self.waiting: dict[Hashable, list[Stored]] = {}
        self.slow_left = SLOW_LEVELS

    def add(self, stored: Stored) -> Iterator[Plan]:
        """Yield the groups that this tensor completes."""
        key = _kind(stored)
        if stored.flat.size >= (LARGE if key == LEVELS else LARGE_PLAIN):
            yield self._counted(_alone(stored, self.slow_left >= stored.flat.size))
            return
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
    fitting = _kind(stored) == LEVELS and not _repeats(stored)
    levels = choose_levels([stored], slow=slow) if fitting else None
    if levels is not None and _settled(levels, [stored]):
        return [stored], levels
    single = choose(stored.flat)
    return [stored], levels if levels is not None and levels.size < single.size else single


def _coded(key: Hashable, tensors: list[Stored], slow: bool) -> Iterator[Plan]:
    """Yield the groups of a pool: all together, or each by itself, whichever is smaller."""
    if key == LEVELS:
        repeating = [stored for stored in tensors if _repeats(stored)]
        names = {stored.name for stored in repeating}
        others = [stored for stored in tensors if stored.name not in names]
        yield from (([stored], choose(stored.flat)) for stored in repeating)
        yield from _level_plan(others, slow) if others else ()
        return
    together = [(tensors, choose(np.concatenate([stored.flat for stored in tensors])))]
    apart = [([stored], choose(stored.flat)) for stored in tensors]
    yield from min(together, apart, key=_size)


def _level_plan(tensors: list[Stored], slow: bool) -> list[Plan]:
    """Return the groups of tensors of levels: one stream, each alone, or one stream but for what is smaller alone."""
    pooled = choose_levels(tensors, slow=slow)
    if pooled is not None and _settled(pooled, tensors):
        return [(tensors, pooled)]
    apart = [([stored], choose(stored.flat)) for stored in tensors]
    if pooled is None:
        return apart
    plans = [apart, [(tensors, pooled)]]
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
        plans.append([(rest, smaller), *alone])
    return min(plans, key=_size)


def _settled(encoded: Encoded, tensors: list[Stored]) -> bool:
    """Return whether an encoding is near the order-0 bound, so that a code of single symbols cannot be far below."""
    return encoded.size <= NEAR * sum(map(shannon, tensors)) + NEAR_BYTES


def _repeats(stored: Stored) -> bool:
    """Return whether symbols come in repeated runs, as in tables of indices: there deflate is far below the bound."""
    part = stored.flat[:SAMPLE]
    bound = shannon(replace(stored, flat=part))
    return len(zlib.compress(part.tobytes(), 1)) < REPEATED * bound


def _size(groups: list[Plan]) -> int:
    return sum(
        len(written_grids(tensors)) + encoded.size + GROUP_BYTES + 2 * len(encoded.chunks)
        for tensors, encoded in groups
    )
