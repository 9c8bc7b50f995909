"""The nearest points of convex sets in a form that can be traced: box, L1 ball, simplex, half-space.

Each function is known by the name that a rule has as `nearest`, and returns the nearest points in the widest float,
but for the box, whose points are in the dtype of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from karikomi.bound.entries import check_shape
from karikomi.bound.extent import SLACK
from karikomi.functional.library import Library
from karikomi.functional.norms import Axes
from karikomi.rule import Array, Rule, Scope
from karikomi.schedule import value_at

Weights = Mapping[str, Array]
Nearest = Callable[[Array, Array], tuple[Array, Array]]
"""``(rows, limits) -> (their nearest points, which of them are outside)``."""

_REFINED = 3  # Michelot's steps after sorting, which remove the rounding of its long sums


def nearest_points(
    rule: Any, weights: Weights, axes: Mapping[str, Axes], *, attempted: Array, library: Library
) -> dict[str, Array]:
    """Return name -> the nearest weights in the set of a rule.

    `axes`: unit axes, for rules per unit. `attempted`: how many steps there were, for a limit that is a schedule.
    """
    step = library.xp.astype(attempted, library.wide)
    return _PROJECTIONS[rule.nearest](rule, weights, axes, step, library)


def _box(
    rule: Any, weights: Weights, axes: Mapping[str, Axes], step: Array, library: Library
) -> dict[str, Array]:
    xp, points = library.xp, {}
    for name, (low, high) in rule.given_for(weights).items():
        point = weights[name]
        for end, inner in ((low, xp.maximum), (high, xp.minimum)):
            if end is not None:
                check_shape(end, tuple(point.shape), where=f"Box: {name}")
                most = _constant(end, point.dtype, xp) + xp.zeros_like(point)
                point = inner(point, most)
        points[name] = point
    return points


def _l1_ball(
    rule: Any, weights: Weights, axes: Mapping[str, Axes], step: Array, library: Library
) -> dict[str, Array]:
    xp = library.xp
    radius = value_at(rule.limit, step, xp=xp)

    def nearest(rows: Array, radii: Array) -> tuple[Array, Array]:
        sizes = xp.abs(rows)
        sums = library.summed(sizes, (1,))
        over = sums - radii
        outside = (xp.abs(over) if rule.sphere else over) > SLACK * radii
        shift = _thresholds(sizes, radii, library)
        if not rule.sphere:
            shift = xp.maximum(shift, xp.zeros_like(shift))
        shrunk = sizes - _column(shift, xp)
        shrunk = xp.maximum(shrunk, xp.zeros_like(shrunk))
        # A direction outwards is needed: zeros have none.
        shrunk = xp.where(sizes > 0, shrunk, xp.zeros_like(shrunk))
        moved = xp.where(rows < 0, -shrunk, shrunk)
        return moved, outside & (radii > 0) & xp.isfinite(radii)

    return _by_rows(rule, weights, axes, radius, nearest, library)


def _simplex(
    rule: Any, weights: Weights, axes: Mapping[str, Axes], step: Array, library: Library
) -> dict[str, Array]:
    xp = library.xp
    total = value_at(rule.total, step, xp=xp)

    def nearest(rows: Array, totals: Array) -> tuple[Array, Array]:
        zeros = xp.zeros_like(rows)
        off = xp.abs(library.summed(rows, (1,)) - totals) > SLACK * totals
        below = xp.max(xp.where(rows < 0, xp.ones_like(rows), zeros), axis=1) > 0
        moved = xp.maximum(rows - _column(_thresholds(rows, totals, library), xp), zeros)
        return moved, (off | below) & (totals > 0) & xp.isfinite(totals)

    return _by_rows(rule, weights, axes, total, nearest, library)


def _half_space(
    rule: Any, weights: Weights, axes: Mapping[str, Axes], step: Array, library: Library
) -> dict[str, Array]:
    xp = library.xp
    normals = rule.given_for(weights)
    groups = [list(normals)] if rule.scope is Scope.GLOBAL else [[name] for name in normals]
    points = {}
    for names in groups:
        flat = {n: library.widened(weights[n]) for n in names}
        whole = {n: tuple(range(len(flat[n].shape))) for n in names}
        most = library.vector([library.peak(flat[n]) for n in names])
        unit = _or_one(xp.max(most), xp)
        along, size, squares = [], [], []
        across = {}
        for name in names:
            check_shape(normals[name], tuple(flat[name].shape), where=f"HalfSpace: {name}")
            normal = _constant(normals[name], library.wide, xp)
            across[name] = normal + xp.zeros_like(flat[name])
            products = across[name] * (flat[name] / unit)
            along.append(library.summed(products, whole[name]))
            size.append(library.summed(xp.abs(products), whole[name]))
            squares.append(library.summed(xp.square(across[name]), whole[name]))
        offset = _constant(rule.offset, library.wide, xp) / unit
        beyond = xp.sum(library.vector(along)) - offset
        rounding = SLACK * (xp.sum(library.vector(size)) + xp.abs(offset))
        outside = (xp.abs(beyond) if rule.equal else beyond) > rounding
        length = xp.sum(library.vector(squares))
        shift = xp.where(outside, beyond, xp.zeros_like(beyond)) / _or_one(length, xp) * unit
        points |= {name: flat[name] - shift * across[name] for name in names}
    return points


_PROJECTIONS: dict[str, Callable[..., dict[str, Array]]] = {
    "box": _box,
    "l1_ball": _l1_ball,
    "simplex": _simplex,
    "half_space": _half_space,
}


def _by_rows(
    rule: Rule,
    weights: Weights,
    axes: Mapping[str, Axes],
    limit: Array,
    nearest: Nearest,
    library: Library,
) -> dict[str, Array]:
    """Return nearest points, where each unit, tensor, or all of them together, is one row of its own."""
    if rule.scope is Scope.GLOBAL:
        return _as_one_row(weights, limit, nearest, library)
    points = {}
    for name, array in weights.items():
        shape = tuple(array.shape)
        order = axes.get(name, ())
        order = (*order, *(axis for axis in range(len(shape)) if axis not in order))
        units = math.prod(shape[axis] for axis in axes.get(name, ()))
        rows = library.xp.permute_dims(library.widened(array), order)
        rows = library.xp.reshape(rows, (units, math.prod(shape) // max(units, 1)))
        done = library.xp.reshape(
            _in_units(rows, limit, nearest, library), [shape[axis] for axis in order]
        )
        points[name] = library.xp.permute_dims(done, [order.index(a) for a in range(len(shape))])
    return points


def _as_one_row(
    weights: Weights,
    limit: Array,
    nearest: Nearest,
    library: Library,
) -> dict[str, Array]:
    xp = library.xp
    row = xp.reshape(library.vector(list(weights.values())), (1, -1))
    done = _in_units(row, limit, nearest, library)[0]
    points, start = {}, 0
    for name, array in weights.items():
        stop = start + math.prod(array.shape)
        points[name] = xp.reshape(done[start:stop], array.shape)
        start = stop
    return points


def _in_units(rows: Array, limit: Array, nearest: Nearest, library: Library) -> Array:
    """Return nearest points of rows that are divided by their largest magnitudes, whose sums cannot overflow."""
    if 0 in tuple(rows.shape):
        return rows
    xp = library.xp
    unit = _or_one(xp.max(xp.abs(rows), axis=1), xp)
    column = _column(unit, xp)
    moved, acts = nearest(rows / column, limit / unit)
    return xp.where(_column(acts, xp), moved * column, rows)


def _thresholds(rows: Array, totals: Array, library: Library) -> Array:
    """Return the t of each row for which ``sum(max(row - t, 0))`` is the total."""
    xp = library.xp
    falling = -xp.sort(-rows, axis=1)
    sums = xp.cumulative_sum(falling, axis=1)
    counts = xp.arange(1, rows.shape[1] + 1, dtype=rows.dtype)
    # The mean excess of the k largest entries rises with k as long as the next one belongs to them.
    shift = xp.max((sums - _column(totals, xp)) / counts, axis=1)
    for _ in range(_REFINED):
        active = rows > _column(shift, xp)
        ones = xp.ones_like(rows)
        count = xp.sum(xp.where(active, ones, xp.zeros_like(rows)), axis=1)
        kept = library.summed(xp.where(active, rows, xp.zeros_like(rows)), (1,))
        some = count > 0
        shift = xp.where(some, (kept - totals) / xp.where(some, count, count + 1), shift)
    return shift


def _constant(value: Any, dtype: Any, xp: Any) -> Array:
    # A copy, since a read-only array cannot become a tensor of torch.
    return xp.asarray(np.array(value), dtype=dtype)


def _or_one(sizes: Array, xp: Any) -> Array:
    usable = (sizes > 0) & xp.isfinite(sizes)
    return xp.where(usable, sizes, xp.ones_like(sizes))


def _column(numbers: Array, xp: Any) -> Array:
    return xp.reshape(numbers, (-1, 1))
