"""Elements of charts, as escaped SVG: text, marks, strokes, legend, frame.

Colours are in the style sheet (light, dark and print differ). A style is a colour together with a
dash and the shape of a mark, so that series do not differ by colour alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from markupsafe import Markup

from karikomi.report.scale import tick_text

BROAD, NARROW = 860, 340
"""Widths that charts are drawn for: a screen or paper, and a phone; text has the size of the page's in both."""

LEFT = 66
STYLES = 6
_LETTER = 6.8  # pixels a letter of the 12 px chart font takes, on average and rounded up
_width: ContextVar[int] = ContextVar("width", default=BROAD)
_ROW = 18

Wording = Callable[[float], str]
Points = Sequence[tuple[float | None, float | None]]


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: its label, its spacing, and the format of its ticks."""

    label: str
    log: bool = False
    zero: bool = False
    wording: Wording = tick_text


@dataclass(frozen=True, slots=True)
class Series:
    """One line or one set of marks; `style` picks colour, dash and shape of the mark together.

    `whiskers` holds (x, low, high) for a bar of spread behind each point.
    """

    name: str
    points: Points
    style: int = 0
    line: bool = True
    marks: bool = False
    whiskers: Sequence[tuple[float, float | None, float | None]] = ()


def width() -> int:
    """Return the width that is drawn for at the moment."""
    return _width.get()


def is_narrow() -> bool:
    """Return whether a phone is drawn for."""
    return width() == NARROW


def drawn(draw: Callable[[], Markup]) -> Markup:
    """Return a chart for broad and for narrow screens, of which the style sheet shows one.

    >>> drawn(lambda: frame("Loss", "falls", 10, [])).count("<svg")
    2
    """
    token = _width.set(NARROW)
    try:
        narrow = draw()
    finally:
        _width.reset(token)
    return Markup('<div class="broad">{}</div>\n<div class="narrow">{}</div>').format(
        draw(), narrow
    )


def frame(title: str, description: str, height: float, parts: Sequence[Markup]) -> Markup:
    """Return the SVG element around the parts, named and described for a screen reader."""
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "chart"
    slug += "-narrow" if is_narrow() else ""
    return Markup(
        '<svg viewBox="0 0 {w} {h}" role="img" aria-labelledby="{s}-t {s}-d">'
        '<title id="{s}-t">{t}</title><desc id="{s}-d">{d}</desc>\n{p}\n</svg>'
    ).format(w=width(), h=pixel(height), s=slug, t=title, d=description, p=Markup("\n").join(parts))


def label(x: float, y: float, text: str, kind: str = "") -> Markup:
    """Return a line of text at a position."""
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, pixel(x), pixel(y), text)


def mark(x: float, y: float, style: int, size: float = 4.0) -> Markup:
    """Return the mark of a style: disc, triangle, square, diamond, cross or downward triangle."""
    a, b = size, size * 0.9
    shapes = (
        [],
        [(0, -a), (a, b), (-a, b)],
        [(-b, -b), (b, -b), (b, b), (-b, b)],
        [(0, -a * 1.3), (a * 1.3, 0), (0, a * 1.3), (-a * 1.3, 0)],
        [],
        [(0, a), (a, -b), (-a, -b)],
    )
    kind, corners = style % STYLES, shapes[style % STYLES]
    if kind == 0:
        return Markup('<circle class="m0" cx="{}" cy="{}" r="{}"/>').format(pixel(x), pixel(y), a)
    if kind == 4:
        return Markup('<path class="m4" d="M{} {}l{w} {w}m0 -{w}l-{w} {w}"/>').format(
            pixel(x - a), pixel(y - a), w=2 * a
        )
    path = "L".join(f"{pixel(x + dx)} {pixel(y + dy)}" for dx, dy in corners)
    return Markup('<path class="m{}" d="M{}Z"/>').format(kind, path)


def legend(series: Sequence[Series]) -> tuple[Markup, int]:
    """Return the legend and its number of rows; a single line has no legend."""
    if len(series) < 2:
        return Markup(""), 0
    start = 8.0 if is_narrow() else float(LEFT)
    parts, x, row = [], start, 1
    for curve in series:
        taken = 40 + _LETTER * len(curve.name)
        if x + taken > width() and x > start:
            x, row = start, row + 1
        y = 10 + _ROW * row
        if curve.line:
            parts.append(stroke("s", curve.style, f"M{pixel(x)} {y}h24"))
        if curve.marks:
            parts.append(mark(x + 12, y, curve.style))
        parts.append(label(x + 30, y + 4, curve.name))
        x += taken + 10
    return Markup("").join(parts), row


def text_width(text: str) -> float:
    """Return the approximate width of a line of chart text, in pixels."""
    return _LETTER * len(text)


def pixel(value: float) -> str:
    """Return a coordinate with one decimal at most."""
    return f"{value:.1f}".removesuffix(".0")


def stroke(kind: str, style: int, path: str) -> Markup:
    """Return a stroke in a style, or of a kind in a style: a line, a whisker."""
    return Markup('<path class="{}{}" d="{}"/>').format(kind, style % STYLES, path)
