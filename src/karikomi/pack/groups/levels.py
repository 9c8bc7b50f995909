"""Levels: codes as small signed integers around zero, neighbouring values next to each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile
from karikomi.pack.codecs.level_tables import MOST_LEVEL
from karikomi.quantize.grids import Codebook, Grid

Order = NDArray[np.int64]

ORDERS: dict[type, Callable[[Grid], Order]] = {}
"""Kind of grid -> function that returns its codes, from that of the lowest value to that of the highest.

A grid without one has codes that are levels already.
"""


def _by_value(grid: Grid) -> Order:
    return np.argsort(grid.numbers, kind="stable")


ORDERS[Codebook] = _by_value


def levels_of(flat: NDArray, grid: Grid | None) -> NDArray[np.int16] | None:
    """Return the levels of integer codes, or ``None`` where they are floats or too large."""
    if flat.dtype.kind not in "iu":
        return None
    order = _order(grid)
    if order is not None:
        ranks = np.empty(order.size, np.int64)
        ranks[order] = np.arange(order.size)
        if max(ranks[0], order.size - 1 - ranks[0]) > MOST_LEVEL:
            return None
        return (ranks - ranks[0]).astype(np.int16).take(flat)
    if flat.size and not (-MOST_LEVEL <= int(flat.min()) and int(flat.max()) <= MOST_LEVEL):
        return None
    return flat.astype(np.int16)


def codes_of(levels: NDArray[np.int16], grid: Grid | None, dtype: np.dtype) -> NDArray:
    """Return the codes of levels; raise `BadFile` for a level that is none of the grid's."""
    order = _order(grid)
    if order is None:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        _require(levels, low, high)
        return levels.astype(dtype)
    zero = int(np.flatnonzero(order == 0)[0])
    _require(levels, -zero, order.size - 1 - zero)
    return order.astype(dtype).take(levels + zero)


def _order(grid: Grid | None) -> Order | None:
    made = ORDERS.get(type(grid))
    return None if made is None or grid is None else made(grid)


def _require(levels: NDArray[np.int16], low: int, high: int) -> None:
    if levels.size and not (low <= int(levels.min()) and int(levels.max()) <= high):
        got = f"{levels.min()}..{levels.max()}"
        raise BadFile("levels outside of the grid", got=got, allowed=f"{low}..{high}")
