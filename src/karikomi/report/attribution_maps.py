"""Pictures of attributions as inline SVG: inputs beside what counts in them for the network before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from karikomi.report.drawing import frame, label, pixel, text_width, width
from karikomi.report.pictures import SIDE, picture
from karikomi.report.wording import plain, shorten

_GAP = 14.0
_MARGIN, _LINE = 56.0, 22.0
_MOST_WORDS, _MOST_LETTERS = 64, 16
_BROAD_LETTERS = 1.1
"""Words of few letters may have broad ones only."""
_SPACE, _END = "\N{OPEN BOX}", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
_SHADE = 0.45
"""The strongest shade behind a word, on which its text still has contrast."""


def map_pairs(shown: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Return rows of three pictures: the input, and its attributions by both networks; None for inputs of no shape.

    Images (channels first or last) and squares that were flattened are drawn as images; anything else of one or
    two axes as strips of cells.
    """
    parts: list[Markup] = []
    top = 20.0
    for row in shown:
        height = 0.0
        for place, name in enumerate(("input", "before", "after")):
            left = 8.0 + place * (SIDE + _GAP)
            made = picture(row.get(name), left, top, signed=name != "input")
            if made is None:
                return None
            parts += [label(left, top - 6, name, "name"), made[0]]
            height = max(height, made[1])
        top += height + 18.0
        parts.append(label(8.0, top - 2, f"cosine {plain(row.get('cosine'), 2)}", "name"))
        top += 30.0
    title = "Attributions of some examples"
    words = "Rows: the input, and what counts in it for the network before and after; blue for, orange against."
    return frame(title, words, top, parts) if parts else None


def word_pairs(shown: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Return the tokens of each example twice, shaded by their weights before and after; lines break as in a text."""
    parts: list[Markup] = []
    top = 18.0
    for row in shown:
        tokens = np.asarray(row.get("input"), float).astype(int).reshape(-1).tolist()
        given = row.get("words")
        words = [str(word) for word in given] if isinstance(given, list | tuple) else tokens
        words = [shorten(_visible(str(word)), _MOST_LETTERS) for word in words[:_MOST_WORDS]]
        for key in ("before", "after"):
            weights = np.asarray(row.get(key), float).reshape(-1)[: len(words)]
            peak = float(np.abs(weights).max(initial=0.0)) or 1.0
            parts.append(label(8.0, top + 13, key, "name"))
            made, top = _text(words, (weights / peak).tolist(), top)
            parts += made
        more = len(tokens) - len(words)
        words_left = f"; {more} more tokens are not shown" if more > 0 else ""
        parts.append(
            label(8.0, top + 14, f"cosine {plain(row.get('cosine'), 2)}{words_left}", "name")
        )
        top += 34.0
    title = "Tokens that count in some examples"
    words = "Each token with its weight; blue counts for the prediction, orange against."
    return frame(title, words, top, parts) if parts else None


def _text(words: Sequence[str], weights: Sequence[float], top: float) -> tuple[list[Markup], float]:
    """Return shaded words, broken into lines from `top` on, and where the next line would begin."""
    left, parts = _MARGIN, list[Markup]()
    for word, weight in zip(words, weights, strict=False):
        wide = _BROAD_LETTERS * text_width(word) + 8.0
        if left + wide > width() - 8.0 and left > _MARGIN:
            left, top = _MARGIN, top + _LINE
        parts.append(_cell(left, top, wide - 1.0, 18.0, _kind(weight), _SHADE * abs(weight)))
        parts.append(label(left + wide / 2, top + 13, word, "mid"))
        left += wide
    return parts, top + _LINE + 4.0


def _visible(word: str) -> str:
    """Return a word in which spaces and line ends are seen."""
    return word.replace("\n", _END).replace(" ", _SPACE) or _SPACE


def _kind(weight: float) -> str:
    return "for" if weight >= 0 else "against"


def _cell(x: float, y: float, width: float, height: float, kind: str, strength: float) -> Markup:
    """Return a cell whose class is its colour, and whose opacity its strength in [0, 1]."""
    return Markup(
        '<rect class="{}" x="{}" y="{}" width="{}" height="{}" fill-opacity="{}"/>'
    ).format(
        kind, pixel(x), pixel(y), pixel(width), pixel(height), f"{min(max(strength, 0.0), 1.0):.2f}"
    )
