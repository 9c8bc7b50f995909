"""Pictures of attributions as inline SVG: inputs beside what counts in them for the network before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from karikomi.report.drawing import frame, is_narrow, label, pixel, width
from karikomi.report.wording import plain

_SIDE, _GAP = 92.0, 14.0
_MOST_CELLS = 32
_ROW = 46.0


def map_pairs(shown: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Return rows of three pictures: the input, and its attributions by both networks; None for inputs of no shape.

    Images (channels first or last) and squares that were flattened are drawn as images; anything else of one or
    two axes as strips of cells.
    """
    parts: list[Markup] = []
    top = 18.0
    for row in shown:
        drawn = [
            _plane(row.get(key), signed=key != "input") for key in ("input", "before", "after")
        ]
        if any(plane is None for plane in drawn):
            return None
        height = 0.0
        for place, (plane, name) in enumerate(
            zip(drawn, ("input", "before", "after"), strict=True)
        ):
            left = 8.0 + place * (_SIDE + _GAP)
            cells, tall = _cells(plane, left, top, signed=name != "input")  # type: ignore[arg-type]
            parts += [label(left, top - 6, name), *cells]
            height = max(height, tall)
        parts.append(
            label(8.0 + 3 * (_SIDE + _GAP), top + 14, f"cosine {plain(row.get('cosine'), 2)}")
        )
        top += height + 34.0
    title = "Attributions of some examples"
    words = "Rows: the input, and what counts in it for the network before and after; blue for, orange against."
    return frame(title, words, top, parts) if parts else None


def word_pairs(shown: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Return for each example its tokens with their weights before and after, as shades of two rows of cells."""
    parts: list[Markup] = []
    top = 18.0
    for row in shown:
        tokens = (
            np.asarray(row.get("input"), float)
            .astype(int)
            .reshape(-1)[: _MOST_CELLS // 4 if is_narrow() else _MOST_CELLS]
        )
        step = min((width() - 90.0) / max(len(tokens), 1), 40.0)
        for line, key in enumerate(("before", "after")):
            weights = np.asarray(row.get(key), float).reshape(-1)[: len(tokens)]
            peak = float(np.abs(weights).max(initial=0.0)) or 1.0
            y = top + line * 20.0
            parts.append(label(8.0, y + 13, key))
            for place, (token, weight) in enumerate(
                zip(tokens.tolist(), (weights / peak).tolist(), strict=True)
            ):
                x = 70.0 + place * step
                kind = "for" if weight >= 0 else "against"
                parts.append(_cell(x, y, step, 18.0, kind, 0.8 * abs(weight)))
                parts.append(label(x + step / 2, y + 13, str(token), "mid"))
        parts.append(label(70.0, top + 54.0, f"cosine {plain(row.get('cosine'), 2)}"))
        top += _ROW + 30.0
    title = "Tokens that count in some examples"
    words = "Cells: the number of each token; blue counts for the prediction, orange against."
    return frame(title, words, top, parts) if parts else None


def _plane(values: Any, *, signed: bool) -> np.ndarray | None:
    """Return a plane (height, width) of an input or an attribution, scaled to [-1, 1] or [0, 1]."""
    array = np.asarray(values, float)
    if array.ndim == 3:
        channel = 0 if array.shape[0] in (1, 3) else 2
        if array.shape[channel] not in (1, 3):
            return None
        array = array.sum(axis=channel)
    elif array.ndim == 1:
        side = round(float(np.sqrt(array.size)))
        array = array.reshape(side, side) if side * side == array.size and side > 3 else array[None]
    if array.ndim != 2 or not array.size:
        return None
    if signed:
        return array / (float(np.abs(array).max()) or 1.0)
    low, spread = array.min(), float(np.ptp(array)) or 1.0
    return (array - low) / spread


def _cells(
    plane: np.ndarray, left: float, top: float, *, signed: bool
) -> tuple[list[Markup], float]:
    rows, columns = (_thinned(size) for size in plane.shape)
    plane = plane[np.ix_(rows, columns)]
    step = _SIDE / plane.shape[1]
    tall = min(step, _SIDE / plane.shape[0]) if plane.shape[0] > 1 else 22.0
    found = []
    for y, line in enumerate(plane.tolist()):
        for x, value in enumerate(line):
            kind = "grey" if not signed else "for" if value >= 0 else "against"
            found.append(_cell(left + x * step, top + y * tall, step, tall, kind, abs(value)))
    return found, tall * plane.shape[0]


def _thinned(size: int) -> np.ndarray:
    return np.unique(np.linspace(0, size - 1, min(size, _MOST_CELLS)).astype(int))


def _cell(x: float, y: float, width: float, height: float, kind: str, strength: float) -> Markup:
    """Return a cell whose class is its colour, and whose opacity its strength in [0, 1]."""
    return Markup(
        '<rect class="{}" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}"/>'
    ).format(
        kind, pixel(x), pixel(y), pixel(width), pixel(height), f"{min(max(strength, 0.0), 1.0):.2f}"
    )
