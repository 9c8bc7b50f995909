"""Output units of a weight: which of its entries share a row, whatever the layout of the layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]


class OutputUnits(NamedTuple):
    """Which weights make one output unit: an index of `axis`, in each of `groups` parts of the first axis.

    A fact of the layer's type. `axis` of ``None``: the tensor has no units (a bias).
    """

    axis: int | None = None
    groups: int = 1

    def fit(self, shape: Shape) -> bool:
        """Return whether a tensor of this shape has these units.

        >>> OutputUnits(1, 2).fit((4, 3)), OutputUnits(1, 2).fit((5, 3)), OutputUnits(2).fit((4, 3))
        (True, False, False)
        """
        if self.axis is None:
            return self.groups == 1
        parts = self.groups == 1 or (self.axis > 0 and not shape[0] % self.groups)
        return self.axis < len(shape) and parts

    def rows(self, shape: Shape) -> tuple[int, int]:
        """Return the number of units of a tensor, and of weights in each.

        >>> OutputUnits(1, 2).rows((4, 3, 5))
        (6, 10)
        """
        size = math.prod(shape)
        count = 1 if self.axis is None else shape[self.axis] * self.groups
        return count, size // count if count else 0


def to_rows(array: NDArray, units: OutputUnits) -> NDArray:
    """Return a tensor as (units, weights of a unit), these in C order; a copy where it cannot be a view.

    >>> to_rows(np.arange(6).reshape(2, 3), OutputUnits(1)).tolist()
    [[0, 3], [1, 4], [2, 5]]
    """
    if units.axis is None:
        return array.reshape(1, -1)
    split = _split(array.shape, units)
    moved = np.moveaxis(array.reshape(split), units.axis + 1, 1)
    return moved.reshape(units.rows(array.shape))


def from_rows(rows: NDArray, shape: Shape, units: OutputUnits) -> NDArray:
    """Return the tensor of a shape whose rows these are: the inverse of `to_rows`."""
    if units.axis is None:
        return rows.reshape(shape)
    split = list(_split(shape, units))
    moved = rows.reshape([split[0], split.pop(units.axis + 1), *split[1:]])
    return np.ascontiguousarray(np.moveaxis(moved, 1, units.axis + 1)).reshape(shape)


def _split(shape: Shape, units: OutputUnits) -> Shape:
    return units.groups, shape[0] // units.groups, *shape[1:]
