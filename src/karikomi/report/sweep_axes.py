"""The axes of a sweep in views: clips across, and all else as columns or lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.report.result_checks import table
from karikomi.report.wording import MISSING, number, plain, scaled

_CLIP = ("limit", "rule")
_COLUMN = ("bound", "rate", "sparsity", "bits")
_TEXTS = ("rule", "bound")

Point = Mapping[str, Any]


def clip_name(point: Point) -> str:
    """Return the limit or rule of a point.

    >>> clip_name({"limit": None}), clip_name({"limit": 0.5}), clip_name({"rule": "AGC(0.01)"})
    ('none', '0.5', 'AGC(0.01)')
    """
    rule, limit = _value(point, "rule"), point.get("limit")
    if rule is not None:
        return str(rule)
    return "none" if limit is None else MISSING if number(limit) is None else plain(limit)


def column_name(point: Point) -> str:
    """Return all of a point but its clip.

    >>> column_name({"sparsity": 0.9975, "bits": 4})
    'sparsity 99.75 %, 4 bits'
    """
    # All digits: of 0.99 and 0.995 neither is 100 %, nor are they the same column.
    share = scaled(point.get("sparsity"), 100)
    parts = [f"sparsity {MISSING if share is None else f'{share:.6g} %'}"]
    bits, rate, bound = (_value(point, key) for key in ("bits", "rate", "bound"))
    parts += [] if bits is None else [f"{plain(bits)} bits"]
    parts += [] if rate is None else [f"rate {plain(rate)}"]
    parts += [] if bound is None else [str(bound)]
    return ", ".join(parts)


def setting_name(point: Point) -> str:
    """Return the clip of a point, with its bound and rate if any."""
    bound, rate = _value(point, "bound"), _value(point, "rate")
    parts = [clip_name(point)]
    parts += [] if rate is None else [f"rate {plain(rate)}"]
    parts += [] if bound is None else [str(bound)]
    return ", ".join(parts)


def clips_of(points: Sequence[Point]) -> list[Point]:
    """Return the different clips: limits rising, none, then rules."""
    return _different(points, _CLIP)


def columns_of(points: Sequence[Point]) -> list[Point]:
    """Return the different columns: without a bound first, then by rate, sparsity and bits."""
    return _different(points, _COLUMN)


def find(points: Sequence[Point], clip: Point, column: Point) -> Point:
    """Return the point of a clip and a column, or an empty one."""
    wanted = _key(clip, _CLIP) + _key(column, _COLUMN)
    return next((p for p in points if _key(p, _CLIP) + _key(p, _COLUMN) == wanted), {})


def order(point: Point) -> tuple[Any, ...]:
    """Return what points are sorted by: the clip, then the column."""
    return _sorted_by(point, _CLIP) + _sorted_by(point, _COLUMN)


def mean_of(point: Point, key: str) -> float | None:
    """Return the mean of a figure of a point."""
    return number(table(point.get(key)).get("mean"))


def _different(points: Sequence[Point], keys: Sequence[str]) -> list[Point]:
    seen = {_key(point, keys): {key: point.get(key) for key in keys} for point in points}
    return sorted(seen.values(), key=lambda point: _sorted_by(point, keys))


def _value(point: Point, key: str) -> Any:
    value = point.get(key)
    if key in _TEXTS:
        return value if isinstance(value, str) else None
    return number(value)


def _key(point: Point, keys: Sequence[str]) -> tuple[Any, ...]:
    return tuple(_value(point, key) for key in keys)


def _sorted_by(point: Point, keys: Sequence[str]) -> tuple[Any, ...]:
    found: list[Any] = []
    for key in keys:
        value = _value(point, key)
        if key in _TEXTS:
            found.append(value or "")
            continue
        # No limit is the largest; no rate and no bits come first, as they are what the others are compared with.
        unknown = math.inf if key in ("limit", "sparsity") else -math.inf
        found.append(unknown if value is None else value)
    # A rule has no limit: it comes after all of them.
    return tuple(reversed(found)) if keys == _CLIP else tuple(found)
