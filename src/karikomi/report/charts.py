"""Line charts as inline SVG: axes, ticks, lines, marks, whiskers and labelled stretches.

Without a plotting library, because pages are one file without scripts, reproducible byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from karikomi.report.drawing import (
    LEFT,
    Axis,
    Series,
    frame,
    is_narrow,
    label,
    legend,
    mark,
    pixel,
    stroke,
    text_width,
    width,
)
from karikomi.report.scale import Scale, fit
from karikomi.report.wording import number, shorten

_RIGHT, _BOTTOM, _PLOT = 16, 46, 210


@dataclass(frozen=True, slots=True)
class Band:
    """A range of the horizontal axis, labelled with as much of ``number name`` as fits."""

    name: str
    number: str
    first: float
    last: float


def line_chart(
    title: str,
    description: str,
    series: Sequence[Series],
    *,
    x: Axis,
    y: Axis,
    names: Sequence[str] = (),
    bands: Sequence[Band] = (),
) -> Markup:
    """Return a line chart; with `names` the horizontal axis has one slot for each name.

    Points without a position (None, NaN, zero on a log axis) leave a gap.

    >>> chart = line_chart("Loss", "falls", [Series("loss", [(0, 2.0), (1, 1.0)])],
    ...                    x=Axis("step"), y=Axis("loss"))
    >>> chart.count("<path"), "<title" in chart
    (1, True)
    """
    keys, rows = legend(series)
    top = 26 + 18 * rows
    bottom = top + _PLOT
    across = [value for curve in series for value, _ in curve.points]
    across += [edge for band in bands for edge in (band.first, band.last)]
    # Half a slot of space on either side, so that whiskers do not touch the axes.
    slots = Scale(-0.5, len(names) - 0.5, LEFT, width() - _RIGHT)
    x_scale = slots if names else _fit_x(across, x)
    y_scale = fit(_heights(series), bottom, top, log=y.log, zero=y.zero)
    parts = [_band(band, index, x_scale, top) for index, band in enumerate(bands)]
    parts += [_level(tick, y_scale, y) for tick in y_scale.ticks()]
    parts += _x_ticks(x_scale, x, names, bottom)
    parts += [
        Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(
            LEFT, width() - _RIGHT, bottom, bottom
        ),
        label(LEFT - 58, 14, y.label, "name"),
        label((LEFT + width() - _RIGHT) / 2, bottom + 36, x.label, "name mid"),
        keys,
    ]
    parts += [_draw(curve, x_scale, y_scale) for curve in series]
    if not any(value is not None for value in map(number, _heights(series))):
        parts.append(label((LEFT + width()) / 2, top + _PLOT / 2, "nothing recorded", "name mid"))
    return frame(title, description, bottom + _BOTTOM, parts)


def _fit_x(values: Sequence[float | None], axis: Axis) -> Scale:
    seen = [exact for value in values if (exact := number(value)) is not None]
    if axis.log or not seen or min(seen) == max(seen):
        return fit(seen, LEFT, width() - _RIGHT, log=axis.log)
    return Scale(min(seen), max(seen), LEFT, width() - _RIGHT)


def _heights(series: Sequence[Series]) -> list[float | None]:
    points = [y for curve in series for _, y in curve.points]
    return points + [edge for curve in series for whisker in curve.whiskers for edge in whisker[1:]]


def _level(tick: float, scale: Scale, axis: Axis) -> Markup:
    y = scale.place(tick) or 0.0
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    return line.format(LEFT, width() - _RIGHT, pixel(y), pixel(y)) + label(
        LEFT - 8, y + 4, axis.wording(tick), "end"
    )


def _x_ticks(scale: Scale, axis: Axis, names: Sequence[str], bottom: float) -> list[Markup]:
    if not names:
        ticks = [(tick, axis.wording(tick)) for tick in scale.ticks(4 if is_narrow() else 9)]
    else:
        room = (width() - LEFT - _RIGHT) / len(names)
        widest = max(map(text_width, names)) + 8
        stride = max(1, math.ceil(min(widest, 120) / room))
        letters = int(stride * room / text_width("x"))
        ticks = [
            (float(slot), shorten(names[slot], max(letters, 3)))
            for slot in range(0, len(names), stride)
        ]
    line = Markup('<line class="axis" x1="{x}" x2="{x}" y1="{}" y2="{}"/>')
    parts = []
    for value, text in ticks:
        x = scale.place(value) or 0.0
        parts.append(line.format(bottom, bottom + 4, x=pixel(x)))
        # A centred text at the end would exceed the picture.
        edge = "end" if x + text_width(text) / 2 > width() else "mid"
        parts.append(label(width() - 2 if edge == "end" else x, bottom + 18, text, edge))
    return parts


def _band(band: Band, index: int, scale: Scale, top: float) -> Markup:
    first, last = scale.place(band.first) or 0.0, scale.place(band.last) or 0.0
    part = Markup('<rect class="band{}" x="{}" y="{}" width="{}" height="{}"/>').format(
        index % 2, pixel(first), pixel(top), pixel(max(last - first, 0.5)), _PLOT
    )
    fitting = (
        text
        for text in (f"{band.number} {band.name}", band.number)
        if text_width(text) + 10 <= last - first
    )
    return part + label(first + 5, top + 13, next(fitting, ""), "stage")


def _draw(series: Series, x_scale: Scale, y_scale: Scale) -> Markup:
    places = [(x_scale.place(x), y_scale.place(y)) for x, y in series.points]
    parts = [_whisker(whisker, series.style, x_scale, y_scale) for whisker in series.whiskers]
    if series.line:
        parts.append(stroke("s", series.style, _trace(places)))
    if series.marks:
        parts += [mark(x, y, series.style) for x, y in places if x is not None and y is not None]
    return Markup("").join(parts)


def _trace(places: Sequence[tuple[float | None, float | None]]) -> str:
    pieces, joined = [], False
    for x, y in places:
        if x is None or y is None:
            joined = False
            continue
        pieces.append(f"{'L' if joined else 'M'}{pixel(x)} {pixel(y)}")
        joined = True
    return "".join(pieces)


def _whisker(
    whisker: tuple[float, float | None, float | None], style: int, x_scale: Scale, y_scale: Scale
) -> Markup:
    x, low, high = (x_scale.place(whisker[0]), y_scale.place(whisker[1]), y_scale.place(whisker[2]))
    if x is None or low is None or high is None:
        return Markup("")
    path = f"M{pixel(x - 4)} {pixel(low)}h8m-4 0V{pixel(high)}m-4 0h8"
    return stroke("w", style, path)
