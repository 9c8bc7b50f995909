"""Charts with one row per name, as inline SVG: bars from zero, and dots on a shared axis.

Bars show the rest of a whole, so they start at zero. Dots compare sizes that differ a
hundredfold, so they may stand on a log axis, where a bar would lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from markupsafe import Markup

from karikomi.report.drawing import (
    Axis,
    Series,
    frame,
    is_narrow,
    label,
    legend,
    mark,
    pixel,
    text_width,
    width,
)
from karikomi.report.scale import Scale, fit
from karikomi.report.wording import number, shorten

_ROW, _NAME = 26, 18
_LETTERS, _NARROW_LETTERS = 34, 26
_APART, _STAGGER = 9.0, 5.0


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar; `ghost` is the earlier value, drawn as an outline, `note` the text at its end."""

    name: str
    value: float | None
    note: str = ""
    ghost: float | None = None


@dataclass(frozen=True, slots=True)
class Dots:
    """One row of marks: a value for each series of the chart."""

    name: str
    values: Sequence[float | None]


def bar_chart(
    title: str, description: str, bars: Sequence[Bar], *, axis: Axis, high: float | None = None
) -> Markup:
    """Return horizontal bars from zero; `high` fixes the end of the axis (1 for a share).

    >>> bars = [Bar("fc1", 0.9, "90 %")]
    >>> bar_chart("Sparsity", "by layer", bars, axis=Axis("share")).count("<rect")
    1
    """
    left = _margin([bar.name for bar in bars])
    notes = max((text_width(bar.note) for bar in bars), default=0)
    right = width() - 14 - (0 if is_narrow() else notes)
    values = [*(bar.value for bar in bars), *(bar.ghost for bar in bars), high]
    longest = max((exact for value in values if (exact := number(value)) is not None), default=0.0)
    scale = fit(values, left, max(right, left + 120), zero=True)
    # A round end would take space that the notes beside the bars need.
    scale = replace(scale, high=longest) if longest > 0 else scale
    height = 10 + _row() * len(bars)
    parts = _grid(scale, axis, height)
    for index, bar in enumerate(bars):
        parts += _bar(bar, scale, 10 + _row() * index)
    return frame(title, description, height + 48, parts)


def dot_chart(
    title: str,
    description: str,
    names: Sequence[str],
    rows: Sequence[Dots],
    *,
    axis: Axis,
) -> Markup:
    """Return one row of marks per name, joined by a thin line; `names` label the marks.

    >>> rows = [Dots("0", [1.0, 0.9]), Dots("1", [0.8, None])]
    >>> dot_chart("Classes", "", ["before", "after"], rows, axis=Axis("share")).count("<circle")
    3
    """
    keys = [Series(name, [], style, line=False, marks=True) for style, name in enumerate(names)]
    drawn, lines = legend(keys)
    top = 18 + 18 * lines
    left = _margin([row.name for row in rows])
    values = [value for row in rows for value in row.values]
    scale = fit(values, left + 10, width() - 30, log=axis.log, zero=axis.zero)
    height = top + _row() * len(rows)
    parts = [*_grid(scale, axis, height, top), drawn]
    for index, row in enumerate(rows):
        parts += _dots(row, scale, top + _row() * index, left)
    return frame(title, description, height + 48, parts)


def _row() -> float:
    # On a phone names stand above their row: beside it they would leave no room for the figures.
    return _ROW + _NAME if is_narrow() else _ROW


def _margin(names: Sequence[str]) -> float:
    if is_narrow():
        return 8.0
    return 20 + max((text_width(shorten(name, _LETTERS)) for name in names), default=40)


def _grid(scale: Scale, axis: Axis, bottom: float, top: float = 4) -> list[Markup]:
    line = Markup('<line class="grid" x1="{x}" x2="{x}" y1="{}" y2="{}"/>')
    parts = []
    for tick in scale.ticks(5) if is_narrow() else scale.ticks():
        x, text = scale.place(tick) or 0.0, axis.wording(tick)
        # Digits and capitals are broader than letters are on average.
        half = 0.55 * text_width(text) + 1.0
        inside = max(min(x, width() - half), half)
        parts.append(line.format(pixel(top), pixel(bottom), x=pixel(x)))
        parts.append(label(inside, bottom + 16, text, "mid"))
    return [*parts, label((scale.start + scale.end) / 2, bottom + 36, axis.label, "name mid")]


def _name(name: str, x: float, y: float) -> Markup:
    kind, letters = ("", _NARROW_LETTERS) if is_narrow() else ("end", _LETTERS)
    return Markup('<text class="{}" x="{}" y="{}"><title>{}</title>{}</text>').format(
        kind, pixel(x), pixel(y), name, shorten(name, letters)
    )


def _bar(bar: Bar, scale: Scale, y: float) -> list[Markup]:
    note = bar.note or ("" if bar.value is not None else "n/a")
    if is_narrow():
        parts = [_name(bar.name, scale.start, y + 12), label(width() - 4, y + 12, note, "end")]
        y += _NAME
    else:
        parts = [_name(bar.name, scale.start - 8, y + 15)]
    rect = Markup('<rect class="{}" x="{}" y="{}" width="{}" height="18"/>')
    end = scale.place(bar.value)
    ghost = scale.place(bar.ghost)
    zero = scale.place(0.0) or scale.start
    if ghost is not None and ghost > (end or zero):
        first = end if end is not None else zero
        parts.append(rect.format("ghost", pixel(first), pixel(y + 2), pixel(ghost - first)))
    if end is not None:
        # One pixel stays visible, so that small values differ from zero.
        long = max(end - zero, 1.0 if bar.value else 0.0)
        parts.append(rect.format("bar", pixel(zero), pixel(y + 2), pixel(long)))
    if is_narrow():
        return parts
    after = max(place for place in (end, ghost, zero) if place is not None)
    return [*parts, label(after + 6, y + 15, note)]


def _dots(row: Dots, scale: Scale, y: float, left: float) -> list[Markup]:
    places = [scale.place(value) for value in row.values]
    seen = [place for place in places if place is not None]
    if is_narrow():
        parts = [_name(row.name, left, y + 12)]
        y += _NAME + _ROW / 2
    else:
        y += _ROW / 2
        parts = [_name(row.name, left - 6, y + 4)]
    if seen:
        join = Markup('<line class="join" x1="{}" x2="{}" y1="{y}" y2="{y}"/>')
        parts.append(join.format(pixel(min(seen)), pixel(max(seen)), y=pixel(y)))
    else:
        parts.append(label(scale.start, y + 4, "n/a"))
    # Marks at the same position would overlap: such a row is drawn staggered.
    ordered = sorted(seen)
    close = any(after - before < _APART for before, after in pairwise(ordered))
    step = _STAGGER if close else 0.0
    middle = (len(places) - 1) / 2
    return parts + [
        mark(place, y + step * (style - middle), style)
        for style, place in enumerate(places)
        if place is not None
    ]
