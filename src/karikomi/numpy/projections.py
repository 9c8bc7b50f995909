"""The nearest points of convex sets, in float64: box, L1 ball, simplex, half-space."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from karikomi.bound.entries import check_shape
from karikomi.bound.extent import SLACK
from karikomi.rule import Scope
from karikomi.schedule import value_at

Arrays = Mapping[str, np.ndarray]


def nearest_points(
    rule: Any, arrays: Arrays, axes: Mapping[str, Any], *, attempted: int
) -> dict[str, np.ndarray]:
    """Return name -> the nearest array in the set of a rule; `attempted`: steps so far, for a schedule."""
    if rule.nearest == "box":
        return {n: _in_box(n, arrays[n], *ends) for n, ends in rule.given_for(arrays).items()}
    if rule.nearest == "half_space":
        return _in_half_space(rule, arrays)
    limit = rule.limit if rule.nearest == "l1_ball" else rule.total
    size = float(value_at(limit, np.asarray(float(attempted)), xp=np))
    if not 0.0 < size < np.inf:
        return dict(arrays)
    nearest = _on_simplex if rule.nearest == "simplex" else _in_l1_ball
    return _by_vectors(rule, arrays, axes, lambda vector: nearest(vector, size, rule))


def _in_box(name: str, array: np.ndarray, low: Any, high: Any) -> np.ndarray:
    for end in (low, high):
        if end is not None:
            check_shape(end, array.shape, where=f"Box: {name}")
    bounded = array if low is None else np.maximum(array, np.asarray(low, dtype=array.dtype))
    return bounded if high is None else np.minimum(bounded, np.asarray(high, dtype=array.dtype))


def _in_half_space(rule: Any, arrays: Arrays) -> dict[str, np.ndarray]:
    normals = rule.given_for(arrays)
    groups = [list(normals)] if rule.scope is Scope.GLOBAL else [[name] for name in normals]
    points = {}
    for names in groups:
        for name in names:
            check_shape(normals[name], arrays[name].shape, where=f"HalfSpace: {name}")
        flat = np.concatenate([arrays[n].astype(np.float64).ravel() for n in names])
        wide = [np.broadcast_to(normals[n], arrays[n].shape) for n in names]
        normal = np.concatenate([np.ravel(a) for a in wide])
        most = max(float(np.max(np.abs(flat), initial=0.0)), np.finfo(float).tiny)
        beyond = normal @ (flat / most) - rule.offset / most
        rounding = SLACK * (np.abs(normal) @ np.abs(flat / most) + abs(rule.offset / most))
        if (abs(beyond) if rule.equal else beyond) > rounding:
            flat = flat - beyond / (normal @ normal) * most * normal
        ends = np.cumsum([arrays[n].size for n in names])[:-1]
        parts = zip(names, np.split(flat, ends), strict=True)
        points |= {name: part.reshape(arrays[name].shape) for name, part in parts}
    return points


def _on_simplex(vector: np.ndarray, total: float, rule: Any) -> np.ndarray:
    if np.all(vector >= 0.0) and abs(np.sum(vector) - total) <= SLACK * total:
        return vector
    return np.maximum(vector - _threshold(vector, total), 0.0)


def _in_l1_ball(vector: np.ndarray, limit: float, rule: Any) -> np.ndarray:
    sizes = np.abs(vector)
    over = np.sum(sizes) - limit
    if (abs(over) if rule.sphere else over) <= SLACK * limit:
        return vector
    shift = _threshold(sizes, limit)
    shrunk = np.maximum(sizes - (shift if rule.sphere else max(shift, 0.0)), 0.0)
    return np.where(sizes > 0.0, np.sign(vector) * shrunk, 0.0)


def _threshold(vector: np.ndarray, total: float) -> float:
    """Return the t for which ``sum(max(vector - t, 0))`` is the total (Duchi et al. 2008, figure 1)."""
    falling = np.sort(vector)[::-1]
    excess = (np.cumsum(falling) - total) / np.arange(1, len(vector) + 1)
    # Beside entries that are huge the total is lost in rounding, and none is above its excess.
    last = np.flatnonzero(falling > excess)
    return float(excess[last[-1] if len(last) else 0])


def _by_vectors(
    rule: Any,
    arrays: Arrays,
    axes: Mapping[str, Any],
    nearest: Callable[[np.ndarray], np.ndarray],
) -> dict[str, np.ndarray]:
    """Return the arrays with each unit, tensor, or all of them together replaced by its nearest vector."""
    points = {name: array.astype(np.float64) for name, array in arrays.items()}
    if rule.scope is Scope.GLOBAL:
        row = _scaled(np.concatenate([a.ravel() for a in points.values()]), nearest)
        parts = np.split(row, np.cumsum([array.size for array in points.values()])[:-1])
        pairs = zip(points, parts, strict=True)
        return {name: part.reshape(points[name].shape) for name, part in pairs}
    for name, array in points.items():
        if rule.scope is Scope.UNIT:
            units = as_rows(array, axes[name])
            points[name] = from_rows(
                np.array([_scaled(unit, nearest) for unit in units]).reshape(units.shape),
                axes[name],
                array.shape,
            )
        else:
            points[name] = _scaled(array.ravel(), nearest).reshape(array.shape)
    return points


def _scaled(vector: np.ndarray, nearest: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return nearest(vector) if vector.size and np.isfinite(vector).all() else vector


def as_rows(array: np.ndarray, axes: int | tuple[int, ...]) -> np.ndarray:
    """Return one row per unit, shape (units, entries of one)."""
    own = (axes,) if isinstance(axes, int) else axes
    moved = np.moveaxis(array, own, range(len(own)))
    units = int(np.prod(moved.shape[: len(own)]))
    return moved.reshape(units, array.size // max(units, 1))


def from_rows(rows: np.ndarray, axes: int | tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Return the array of this shape that has these rows."""
    own = (axes,) if isinstance(axes, int) else axes
    moved = np.moveaxis(np.empty(shape), own, range(len(own))).shape
    return np.moveaxis(rows.reshape(moved), range(len(own)), own)
