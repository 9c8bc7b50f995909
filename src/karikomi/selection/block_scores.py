"""Count and compare scores block by block, so that no more than a block of them is ever in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.prune.allocations.allocation import Pool
from karikomi.prune.radix_threshold import (
    NOTHING,
    Count,
    Threshold,
    keys,
    score_of,
    shift,
    threshold,
)
from karikomi.prune.scores.score import Score
from karikomi.selection.shard import Shard
from karikomi.selection.threads import each, evenly, workers

BLOCK = 1 << 18
"""Entries of a block: 1 MiB of float32, which stay in a core's cache from one operation to the next."""

SAMPLE = 1 << 15
"""How many scores a first look takes from the tensors of a pool."""

REMEMBERED = 1 << 21
"""How many scores are kept from one count to the next: 8 MiB."""

FEW = 1 << 14
"""Up to so many scores are ordered rather than counted, which costs a millisecond for any number."""


@dataclass(frozen=True, slots=True)
class BlockScores:
    """The scores of what can go in one tensor: float32 blocks in index order, NaN for what is gone.

    `blocks`: called with a stride, gives the blocks of every stride-th score. `gone`: how many are gone.
    `part`: where other processes have the rest of the tensor; `items` and `gone` then count all of it,
    the blocks of what is here, and what follows is called by all of them in the same order.
    """

    name: str
    items: int
    gone: int
    blocks: Callable[[int], Iterable[np.ndarray]]
    part: Shard | None = None

    def check(self) -> None:
        """Raise `NonFinite` for a score that is not finite."""
        seen, infinite = 0, 0
        for block in self.blocks(1):
            if np.isfinite(block).all():
                continue
            # What is gone is NaN.
            seen += int(np.count_nonzero(np.isnan(block)))
            infinite += int(np.count_nonzero(np.isinf(block)))
        if self.part is not None:
            seen, infinite = self.part.total(seen, infinite)
        if infinite or seen > self.gone:
            raise NonFinite(
                "a weight or its score is NaN or infinite",
                where=self.name,
                hint="prune from a checkpoint before the network diverged",
            )

    def sample(self, stride: int) -> np.ndarray:
        """Return the keys of every stride-th score of each block."""
        found = [block[~np.isnan(block)] for block in self.blocks(stride)]
        return keys(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def inside(self, below: float, above: float) -> Iterator[tuple[int, np.ndarray, bool]]:
        """Yield ``(how many are less than `below`, those from it to `above`, all finite)`` by block."""
        for block in self.blocks(1):
            less = block < below
            under = int(np.count_nonzero(less))
            inside = block <= above
            inside ^= less
            # Twice as fast as by the mask itself.
            yield under, block[np.flatnonzero(inside)], bool(np.isfinite(block).all())

    def kept(self, found: Threshold, out: np.ndarray) -> int:
        """Write into `out` (bool, 1-D) which items stay; return how many ties have been removed."""
        value, start = np.float32(found.value), 0
        if found.all_ties:
            for block in self.blocks(1):
                np.greater(block, value, out=out[start : start + len(block)])
                start += len(block)
            return 0
        ties, everywhere = found.ties, None
        if ties and self.part is not None:
            ties, everywhere = self.part.first(self._equal(found.value), ties)
        left = ties
        for block in self.blocks(1):
            stays = out[start : start + len(block)]
            start += len(block)
            np.greater_equal(block, value, out=stays)
            if left:
                equal = np.flatnonzero(block == value)[:left]
                stays[equal] = False
                left -= len(equal)
        return ties - left if everywhere is None else everywhere

    def _equal(self, value: float) -> np.ndarray:
        """Return the indices of the scores that equal a value."""
        found, start = [np.zeros(0, np.int64)], 0
        for block in self.blocks(1):
            found.append(np.flatnonzero(block == np.float32(value)) + start)
            start += len(block)
        return np.concatenate(found)

    def values(self) -> np.ndarray:
        """Return all scores, zero where the weight is gone; raises `NonFinite`."""
        self.check()
        every = np.concatenate([np.zeros(0, np.float32), *self.blocks(1)])
        return np.nan_to_num(every, copy=False, nan=0.0)


def check_all(scored: Sequence[BlockScores]) -> None:
    """Raise `NonFinite` for a score that is not finite, of the first tensor that has one."""
    together = any(tensor.part is not None for tensor in scored)
    entries = 0 if together else sum(tensor.items for tensor in scored)
    each(BlockScores.check, scored, entries=entries)


class _Counter:
    """Counts the scores of a pool, `checked` for finiteness or on the way; remembers few that lie close together."""

    def __init__(self, scored: Sequence[BlockScores], *, checked: bool) -> None:
        self._scored, self._checked = scored, checked
        self._low, self._high, self._below = 0, -1, 0
        self._kept = [np.zeros(0, np.float32)]

    def __call__(self, low: int, high: int) -> tuple[int, np.ndarray]:
        if self._low <= low and high <= self._high:
            found = np.concatenate(self._kept)
            less = found < score_of(low)
            bins = _bins(low, high)
            _add(bins, found[~less & (found <= score_of(high))], low, high)
            return self._below + int(np.count_nonzero(less)), bins
        lists = evenly(self._scored, workers(), entries=lambda value: value.items)
        entries = sum(tensor.items for tensor in self._scored)
        room = REMEMBERED // len(lists)
        counts = each(lambda several: _count(several, low, high, room), lists, entries=entries)
        if not (self._checked or all(item.finite for item in counts)):
            check_all(self._scored)
        self._checked = True
        below, bins = sum(item.below for item in counts), counts[0].bins
        for count in counts[1:]:
            bins += count.bins
        if all(item.inside is not None for item in counts):
            self._low, self._high, self._below = low, high, below
            self._kept = [part for item in counts for part in item.inside or ()]
        return below, bins


class _Counts(NamedTuple):
    below: int
    bins: np.ndarray
    inside: list[np.ndarray] | None
    finite: bool


def _count(scored: Sequence[BlockScores], low: int, high: int, room: int) -> _Counts:
    """Return how many lie below, the bins, and the scores inside, if these are no more than `room`."""
    below, bins, finite = 0, _bins(low, high), True
    kept: list[np.ndarray] | None = [np.zeros(0, np.float32)]
    waiting, many = [np.zeros(0, np.float32)], 0
    for tensor in scored:
        for under, inside, usual in tensor.inside(score_of(low), score_of(high)):
            below, finite = below + under, finite and usual
            room -= len(inside)
            if kept is not None:
                kept.append(inside)
            if room < 0:
                kept = None
            waiting.append(inside)
            many += len(inside)
            # All bins are looked at each time: not for a few scores.
            if many >= len(bins):
                _add(bins, np.concatenate(waiting), low, high)
                waiting, many = [np.zeros(0, np.float32)], 0
    _add(bins, np.concatenate(waiting), low, high)
    return _Counts(below, bins, kept, finite)


def pool_threshold(scored: Sequence[BlockScores], remove: int) -> Threshold:
    """Return the threshold by which `remove` of all items are gone; raises `NonFinite` naming the first bad tensor."""
    total = sum(tensor.items for tensor in scored)
    left = total - sum(tensor.gone for tensor in scored)
    more = max(remove - (total - left), 0)
    together = any(tensor.part is not None for tensor in scored)
    if more == 0 or together or left <= FEW:
        check_all(scored)
    if more == 0:
        return NOTHING
    if together:
        # No sample: all are to look between the same bounds.
        return threshold(_counted_together(scored), more)
    if more <= left <= FEW:
        return _of_few(
            np.concatenate([block for tensor in scored for block in tensor.blocks(1)]), more
        )
    sample = None
    if left > 16 * SAMPLE:
        sample = np.concatenate([tensor.sample(total // SAMPLE) for tensor in scored])
    return threshold(_Counter(scored, checked=left <= FEW), more, sample=sample, total=left)


def _of_few(scores: np.ndarray, remove: int) -> Threshold:
    """Return the threshold of scores that are all here, NaN for what is gone."""
    # NaN sorts last. Zero is added for minus zero, which equals zero.
    value = np.partition(scores, remove - 1)[remove - 1] + np.float32(0.0)
    ties = remove - int(np.count_nonzero(scores < value))
    return Threshold(float(value), ties, ties == int(np.count_nonzero(scores == value)))


def _counted_together(scored: Sequence[BlockScores]) -> Count:
    """Return what counts parts over those who have them, and what is whole as it is."""
    by_holders: dict[tuple[int, ...], list[BlockScores]] = {}
    for tensor in scored:
        by_holders.setdefault(() if tensor.part is None else tensor.part.over, []).append(tensor)
    counters = [
        (_Counter(by_holders[over], checked=True), by_holders[over][0].part)
        for over in sorted(by_holders)
    ]

    def count(low: int, high: int) -> tuple[int, np.ndarray]:
        every = np.zeros(len(_bins(low, high)) + 1, np.int64)
        for counter, part in counters:
            below, bins = counter(low, high)
            numbers = np.concatenate([[below], bins])
            every += numbers if part is None else part.summed(numbers)
        return int(every[0]), every[1:]

    return count


def _bins(low: int, high: int) -> np.ndarray:
    return np.zeros(((high - low) >> shift(low, high)) + 1, np.int64)


def _add(bins: np.ndarray, scores: np.ndarray, low: int, high: int) -> None:
    if len(scores):
        places = (keys(scores) - low) >> shift(low, high)
        np.add(bins, np.bincount(places, minlength=len(bins)), out=bins)


def keep_best(
    scored: Mapping[str, BlockScores], pools: Iterable[Pool], out: Mapping[str, np.ndarray]
) -> dict[str, Threshold]:
    """Write into `out` what stays of each tensor; return the thresholds by tensor name."""
    pools = list(pools)
    together = any(tensor.part is not None for tensor in scored.values())
    # Those who have parts of a tensor ask each other, one pool after the other.
    entries = 0 if together else sum(tensor.items for tensor in scored.values())
    found = each(lambda pool: _kept_of(scored, pool, out), pools, entries=entries)
    return {name: item for pool, item in zip(pools, found, strict=True) for name in pool.names}


def _kept_of(
    scored: Mapping[str, BlockScores], pool: Pool, out: Mapping[str, np.ndarray]
) -> Threshold:
    """Write into `out` what stays of the tensors of one pool; return its threshold."""
    own = [scored[name] for name in pool.names]
    found = pool_threshold(own, pool.remove)
    if found.all_ties or not found.ties:
        entries = sum(item.items for item in own)
        each(lambda name: scored[name].kept(found, out[name]), pool.names, entries=entries)
        return found
    ties = found.ties
    for name in pool.names:
        ties -= scored[name].kept(replace(found, ties=ties), out[name])
    return found


def score_blocks(
    blocks: Iterable[np.ndarray],
    facts: Mapping[str, np.ndarray],
    kept: np.ndarray | None,
    score: Score,
    stride: int,
    *,
    where: str,
) -> Iterator[np.ndarray]:
    """Yield the scores of blocks in index order, NaN where `kept` (bool, 1-D) is false; `facts` in full shape."""
    start = 0
    for block in blocks:
        part = slice(start, start + len(block), stride)
        start += len(block)
        own = {name: np.asarray(fact.flat[part], np.float32) for name, fact in facts.items()}
        with np.errstate(over="ignore"):
            narrow = block[::stride].astype(np.float32, copy=False)
        scores = weight_scores(score, narrow, own, where=where)
        if kept is not None:
            scores = np.where(kept[part], scores, np.float32(np.nan))
        yield scores


def weight_scores(
    score: Score, weights: np.ndarray, facts: Mapping[str, np.ndarray], *, where: str
) -> np.ndarray:
    """Return the score of each of some weights in float32, or refuse what is not one number each."""
    # Blocks may be views of the caller's arrays, which no score is to change.
    shown = weights.view()
    shown.flags.writeable = False
    with np.errstate(over="ignore", invalid="ignore"):
        scores = score.of_weights(shown, facts, xp=np)
        check_scores(score, scores, weights.shape, where=where)
        return np.asarray(scores, np.float32)


def check_scores(score: Score, scores: object, shape: tuple[int, ...], *, where: str) -> None:
    """Refuse what is not one real number per weight, naming the score."""
    # Of an array without axes NumPy gives a scalar.
    array = isinstance(scores, np.ndarray | np.generic)
    if not (array and scores.shape == shape and scores.dtype.kind in "fiub"):
        raise InvalidArgument(
            f"{type(score).__name__} gives one real number per weight, in their shape",
            where=where,
            got=f"{scores.dtype} {scores.shape}" if array else type(scores).__name__,
            allowed=f"an array of shape {shape}",
        )


def split(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the entries of an array in index order in blocks of at most `BLOCK`, copying no more than one."""
    if array.flags.c_contiguous or array.size <= BLOCK:
        flat = array.reshape(-1)
        for start in range(0, flat.size, BLOCK):
            yield flat[start : start + BLOCK]
    else:
        for part in array:
            yield from split(part)


def check_blockwise(score: Score, *, where: str) -> None:
    """Refuse a score that needs to see more of a tensor than a block of its weights."""
    kind = type(score)
    why = {
        "scores units": kind.of_units_only,
        "compares within rows": kind.within_rows,
        "looks at whole tensors": kind.of_tensors,
        "reconstructs what stays": kind.updates,
        f"needs {', '.join(sorted(score.needs))}": bool(score.needs),
    }
    reasons = [reason for reason, holds in why.items() if holds]
    if reasons:
        raise Unsupported(
            f"{kind.__name__} {reasons[0]}, and here is a part of a tensor at a time",
            where=where,
            allowed="scores by single weights alone, such as magnitude",
        )
