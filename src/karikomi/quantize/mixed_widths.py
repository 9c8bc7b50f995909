"""Mixed precision: a width in bits for each tensor, with a given mean."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from karikomi.errors import check

LEAST, MOST = 2, 8


def mixed_widths(
    weighted: Mapping[str, float], sizes: Mapping[str, int], mean: float, *, where: str
) -> dict[str, int]:
    """Return name -> bits in 2..8, of a mean over all weights of at most `mean`, for the least loss.

    ``min sum sizes e(bits)`` with ``e(b) = weighted / (2**(b - 1) - 1)**2``, the loss of a grid of that width per
    weight up to a common factor. Each next bit goes to the tensor where it lowers the loss of a weight most, as long as
    it can be paid: the loss falls convexly with the bits, so that this is the optimum up to the last tensor.
    `weighted`: name -> curvature times the mean squared range of the units. Raises `InvalidArgument` for a mean out of
    2..8.

    >>> mixed_widths({"a": 64.0, "b": 1.0}, {"a": 10, "b": 10}, 4.0, where="")
    {'a': 5, 'b': 3}

    Source: Dong et al. 2020, "HAWQ-V2": the mean curvature times the squared error, under a budget of bits.
    """
    inside = LEAST <= mean <= MOST
    check(where, (inside, "a mean width out of range", mean, f"{LEAST}..{MOST} bits"))
    widths = dict.fromkeys(sizes, LEAST)
    left = (mean - LEAST) * sum(sizes.values())
    waiting = [(-_gain(weighted[name], LEAST), name) for name in sizes]
    heapq.heapify(waiting)
    while waiting:
        _, name = heapq.heappop(waiting)
        if sizes[name] > left + 1e-9:
            continue
        left -= sizes[name]
        widths[name] += 1
        if widths[name] < MOST:
            heapq.heappush(waiting, (-_gain(weighted[name], widths[name]), name))
    return widths


def _gain(weighted: float, bits: int) -> float:
    """Return how much one more bit lowers the loss per weight."""
    return weighted * ((2 ** (bits - 1) - 1) ** -2 - (2**bits - 1) ** -2)
