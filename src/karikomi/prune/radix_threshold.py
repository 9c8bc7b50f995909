"""Exact selection of the k smallest scores by counting, in memory that does not grow.

Read as integers, the bits of floats sort like the floats themselves (`keys`). So counts of scores per
range of keys close in on the threshold; a sample, where there is one, tells where to begin. Counts add
up over blocks, tensors, shards and streams; no more than counts is ever seen here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from karikomi.errors import InvalidArgument

BINS = 1 << 16
LARGEST = 0x7F800000  # the key of infinity

Count = Callable[[int, int], tuple[int, np.ndarray]]
"""``count(low, high)``: how many keys lie below `low`, and how many of those in low..high lie in
each bin of ``2 ** shift(low, high)`` keys; at most `BINS` bins."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """Remove every score below `value`, and the first `ties` of those that equal it.

    *First* is by tensor order, then by index order, so that ties fall the same way everywhere.
    `all_ties`: whether these are all that equal it, so that none has to be looked for.
    """

    value: float
    ties: int
    all_ties: bool = field(default=False, repr=False, compare=False)


NOTHING = Threshold(float("-inf"), 0)


def keys(scores: np.ndarray) -> np.ndarray:
    """Return float32 scores, but no NaN, as int64 numbers in the same order; ``-0.0`` equals ``0.0``.

    >>> keys(np.array([-1.0, -0.0, 0.0, 1e-45], np.float32)).tolist()
    [-1065353216, 0, 0, 1]
    """
    bits = scores.view(np.int32)
    return np.where(bits < 0, -(bits & np.int32(0x7FFFFFFF)), bits).astype(np.int64)


def score_of(key: int) -> float:
    """Return the float32 score that has this key, as a Python number."""
    magnitude = float(np.uint32(abs(key)).view(np.float32))
    return -magnitude if key < 0 else magnitude


def shift(low: int, high: int) -> int:
    """Return by how many bits the distance from `low` is shifted to give the bin of a key."""
    return max((high - low).bit_length() - 16, 0)


def threshold(
    count: Count, remove: int, *, sample: np.ndarray | None = None, total: int = 0
) -> Threshold:
    """Return the threshold that removes exactly the `remove` smallest scores.

    The smallest t with ``#{score <= t} >= remove``; of the scores equal to t the first
    ``remove - #{score < t}``. Equal to a stable sort, for any number of ties.

    `count`: counts float32 scores of any sign. `remove`: from 0 to the number of scores, else
    `InvalidArgument`. `sample`: the keys of some of the `total` scores, which spares a pass over all
    of them if they are spread like the rest; they change no result.

    >>> scores = np.array([1.0, 0.5, 0.5, 2.0], np.float32)
    >>> def count(low, high):
    ...     inside = (found := keys(scores))[(found >= low) & (found <= high)]
    ...     return int((found < low).sum()), np.bincount((inside - low) >> shift(low, high))
    >>> threshold(count, 1)
    Threshold(value=0.5, ties=1)

    Source: radix selection (Knuth 1973, "The Art of Computer Programming" 3, section 5.2.5), begun
    from a sample as in Floyd and Rivest 1975, "Expected Time Bounds for Selection".
    """
    if remove == 0:
        return NOTHING
    low, high = -LARGEST, LARGEST
    if sample is not None and len(sample):
        low, high = bracket(sample, remove, max(total, remove))
    while True:
        below, bins = count(low, high)
        if not below < remove <= below + int(bins.sum()):
            if (low, high) == (-LARGEST, LARGEST):
                raise InvalidArgument(
                    "cannot remove that many",
                    where="threshold",
                    got=remove,
                    allowed=f"0 to {below + int(bins.sum())}",
                )
            low, high = -LARGEST, LARGEST
            continue
        reached = np.cumsum(bins, dtype=np.int64)
        place = int(np.searchsorted(reached, remove - below))
        rank = int(remove - below - (reached[place] - bins[place]))
        wide = shift(low, high)
        if wide == 0:
            return Threshold(score_of(low + place), rank, rank == int(bins[place]))
        low, high = low + (place << wide), min(high, low + ((place + 1) << wide) - 1)


def bracket(sample: np.ndarray, remove: int, total: int) -> tuple[int, int]:
    """Return keys between which the `remove`-th smallest of `total` scores very likely lies.

    Four standard deviations of its rank among a sample that was drawn at random, on either side.
    """
    ordered = np.sort(sample)
    share = remove / total
    rank, size = share * len(ordered), len(ordered)
    spread = 4.0 * (size * share * (1.0 - share)) ** 0.5 + 2.0
    first, last = int(rank - spread), int(rank + spread)
    low = -LARGEST if first < 0 else int(ordered[first])
    high = LARGEST if last >= size else int(ordered[last])
    return low, high
