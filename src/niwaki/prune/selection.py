"""Exact selection of the k smallest scores from two histograms, in memory that does not grow.

The bits of a non-negative float32 read as an integer sort like the float itself. So a histogram of
the high 16 bits finds the bin of the threshold, and one of the low 16 bits within that bin finds
the threshold itself. Histograms add up over blocks, tensors and shards; no more is seen here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from niwaki.errors import InvalidArgument

BINS = 1 << 16

Count = Callable[[int | None], np.ndarray]
"""``count(None)``: how many scores have which high 16 bits; ``count(p)``: how many of those whose
high bits are `p` have which low 16 bits. Both have shape (65536,)."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """Remove every score whose bits are below `bits`, and the first `ties` of those that equal it.

    *First* is by tensor order, then by index order, so that ties fall the same way everywhere.
    """

    bits: int
    ties: int


def threshold(count: Count, remove: int) -> Threshold:
    """Return the threshold that removes exactly the `remove` smallest scores.

    The smallest t with ``#{score <= t} >= remove``; of the scores equal to t the first
    ``remove - #{score < t}``. Scores are float32 and not negative (``-0.0`` counted as ``0.0``).
    Equal to a stable sort, for any number of ties.

    `remove`: from 0 to the number of scores, else `InvalidArgument`.

    >>> bits = np.array([1.0, 0.5, 0.5, 2.0], np.float32).view(np.uint32)
    >>> def count(prefix):
    ...     chosen = bits >> 16 if prefix is None else bits[bits >> 16 == prefix] & 0xFFFF
    ...     return np.bincount(chosen, minlength=65536)
    >>> found = threshold(count, 1)
    >>> float(np.uint32(found.bits).view(np.float32)), found.ties
    (0.5, 1)

    Source: radix selection; Knuth 1973, "The Art of Computer Programming" 3, section 5.2.5.
    """
    if remove == 0:
        return Threshold(0, 0)
    high_counts = count(None)
    total = int(high_counts.sum())
    if not 0 < remove <= total:
        raise InvalidArgument(
            "cannot remove that many", where="threshold", got=remove, allowed=f"0 to {total}"
        )
    high, rest = _locate(high_counts, remove)
    low, ties = _locate(count(high), rest)
    return Threshold(high << 16 | low, ties)


def _locate(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """Return the bin of the `rank`-th smallest (from 1), and its rank within that bin."""
    reached = np.cumsum(counts, dtype=np.int64)
    place = int(np.searchsorted(reached, rank))
    return place, rank - int(reached[place] - counts[place])
