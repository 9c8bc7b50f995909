"""A histogram of norms in bins of a fixed ratio: quantiles of an unbounded history.

The bins are centred on the first norm, so that scaling all norms by a power of two changes no
count. A quantile is off by at most a factor `ERROR`, as long as norms stay within `OCTAVES` doublings
of the first one; the smallest and the largest norm are kept exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from karikomi.clip.history import rank
from karikomi.rule import Array, Namespace, State

PER_OCTAVE = 32
OCTAVES = 20
ERROR = 2 ** (1 / PER_OCTAVE)
"""A bin's upper edge over its lower one: 1.022."""

_MIDDLE = PER_OCTAVE * OCTAVES
_BINS = 2 * _MIDDLE + 1
_TINY = 2.0**-100  # below any ratio that matters, and above what float32 cannot hold
_LN2 = math.log(2.0)


def begin(like: Array, *, xp: Namespace) -> State:
    """Return an empty histogram: ``counts``, and the ``first``, ``smallest`` and ``largest`` norm."""
    nothing = xp.sum(xp.zeros_like(like))
    ends = dict.fromkeys(("first", "smallest", "largest"), nothing)
    return {"counts": xp.zeros((_BINS,), dtype=like.dtype), **ends}


def count(state: State, norm: Array, taught: Array, *, xp: Namespace) -> State:
    """Return the histogram with one more norm, a 0-d array, or as it was."""
    fresh = taught & (state["first"] == 0)
    first = xp.where(fresh, norm, state["first"])
    octaves = _octaves(norm, first, xp=xp)
    bin_ = xp.floor(PER_OCTAVE * octaves + 0.5)
    edge = _MIDDLE * xp.ones_like(bin_)
    bin_ = xp.minimum(xp.maximum(bin_, -edge), edge) + _MIDDLE
    counts = state["counts"]
    here = (xp.arange(_BINS, dtype=counts.dtype) == bin_) & taught
    smallest, largest = state["smallest"], state["largest"]
    return {
        "counts": xp.where(here, counts + 1, counts),
        "first": first,
        "smallest": xp.where(fresh | (taught & (norm < smallest)), norm, smallest),
        "largest": xp.where(taught & (norm > largest), norm, largest),
    }


def quantile(state: State, share: float, *, xp: Namespace) -> Array:
    """Return a quantile, linear between ranks, as a 0-d array; 0 while nothing was counted."""
    return quantiles(state, (share,), xp=xp)[0]


def quantiles(state: State, shares: Sequence[float], *, xp: Namespace) -> list[Array]:
    """Return several quantiles: what they have in common is worked out once."""
    counts, first = state["counts"], state["first"]
    common = _Ranks(
        counts=counts,
        until=xp.cumulative_sum(counts, axis=0),
        places=xp.arange(_BINS, dtype=counts.dtype),
        zeros=xp.zeros_like(counts),
        ones=xp.ones_like(counts),
        lowest=_octaves(state["smallest"], first, xp=xp),
        highest=_octaves(state["largest"], first, xp=xp),
    )
    total = xp.max(common.until)
    last = xp.where(total > 0, total - 1, total)
    found = []
    for share in shares:
        low, part = rank(share, last, xp=xp)
        below = _at_rank(state, common, low, last, xp=xp)
        above = _at_rank(state, common, xp.where(low < last, low + 1, last), last, xp=xp)
        found.append(below + (above - below) * part)
    return found


class _Ranks(NamedTuple):
    """What every rank of a histogram needs: cumulated counts, and the octaves of both ends."""

    counts: Array
    until: Array
    places: Array
    zeros: Array
    ones: Array
    lowest: Array
    highest: Array


def _at_rank(state: State, common: _Ranks, place: Array, last: Array, *, xp: Namespace) -> Array:
    """Return the norm of this rank, as if the norms of a bin were spaced evenly in their logarithms."""
    first, smallest, largest = state["first"], state["smallest"], state["largest"]
    passed = common.until <= place
    bin_ = xp.sum(xp.where(passed, common.ones, common.zeros))
    before = xp.max(xp.where(passed, common.until, common.zeros))
    here = common.places == bin_
    within = (place - before + 0.5) / xp.max(xp.where(here, common.counts, common.ones))
    lower = (bin_ - _MIDDLE - 0.5) / PER_OCTAVE
    upper = (bin_ - _MIDDLE + 0.5) / PER_OCTAVE
    # The outermost bins extend to the smallest and the largest norm.
    lower = xp.where(bin_ == 0, xp.minimum(common.lowest, upper), lower)
    upper = xp.where(bin_ == _BINS - 1, xp.maximum(common.highest, lower), upper)
    norm = first * xp.exp(_LN2 * (lower + within * (upper - lower)))
    norm = xp.minimum(xp.maximum(norm, smallest), largest)
    return xp.where(place <= 0, smallest, xp.where(place >= last, largest, norm))


def _octaves(norm: Array, first: Array, *, xp: Namespace) -> Array:
    """Return ``log2(norm / first)`` through the ratio that is at most 1, which cannot overflow."""
    larger, smaller = xp.maximum(norm, first), xp.minimum(norm, first)
    ratio = smaller / xp.where(larger > 0, larger, xp.ones_like(larger))
    size = -xp.log(xp.maximum(ratio, _TINY * xp.ones_like(ratio))) / _LN2
    return xp.where(norm > first, size, -size)
