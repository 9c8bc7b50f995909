"""Output units that several axes name, as scales of a grid."""

from __future__ import annotations

from collections.abc import Sequence

from karikomi.quantize.units import OutputUnits


def units_along(axes: Sequence[int], shape: Sequence[int]) -> OutputUnits:
    """Return which entries of a tensor share a scale, for the axes whose indices together name one output unit.

    `axes`: ascending, not negative; none for a tensor without units. A grid has scales along one axis, and along the
    first one beside it; of other pairs, such as heads and their width in the kernel of a query, the longest axis has
    the scales. Axes of length 1 do not count.

    >>> units_along([0, 2], (2, 4, 3)), units_along([1, 2], (64, 4, 16)), units_along([2, 3], (3, 3, 8, 1))
    (OutputUnits(axis=2, groups=2), OutputUnits(axis=2, groups=1), OutputUnits(axis=2, groups=1))
    """
    if not axes:
        return OutputUnits()
    long = [axis for axis in axes if shape[axis] > 1] or [axes[-1]]
    if long[0] == 0 and len(long) == 2:
        return OutputUnits(long[1], shape[0])
    return OutputUnits(max(long, key=lambda axis: shape[axis]))
