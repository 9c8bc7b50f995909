"""A page read back: tiles, sentences, tables, and the values of its charts, from pixels by way of the ticks."""

from __future__ import annotations

import html as escapes
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

_NUMBER = r"-?[\d.]+"
_TEXT = re.compile(rf'<text class="([^"]*)" x="({_NUMBER})" y="({_NUMBER})">(.*?)</text>')
_UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
# From the first corner of the mark of a style to its middle.
_MIDDLES = ((0.0, 0.0), (0.0, 4.0), (3.6, 3.6), (0.0, 5.2), (4.0, 4.0), (0.0, -4.0))

Point = tuple[float, float]


def plain(html: str) -> str:
    """Return text without tags and escapes."""
    return escapes.unescape(re.sub(r"<[^>]*>", "", html)).strip()


def amount(text: str) -> float:
    """Return the number of a tick such as ``1,000``, ``1e6`` or ``20 kB``."""
    digits, _, unit = text.replace(",", "").partition(" ")
    return float(digits) * _UNITS.get(unit, 1.0)


@dataclass(frozen=True)
class Page:
    """The HTML of a page."""

    html: str

    @cached_property
    def title(self) -> str:
        return plain(re.findall(r"<h1>(.*?)</h1>", self.html)[0])

    @cached_property
    def lead(self) -> str:
        return plain(re.findall(r'<p class="lead">(.*?)</p>', self.html)[0])

    @cached_property
    def tiles(self) -> dict[str, tuple[str, str]]:
        """Name -> the figure and the note below it."""
        found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)(?:<span>(.*?)</span>)?</dd>", self.html)
        return {plain(name): (plain(value), plain(note)) for name, value, note in found}

    @cached_property
    def sentences(self) -> list[str]:
        """Paragraphs and items of lists."""
        return [plain(text) for text in re.findall(r"<(?:p|li)\b[^>]*>(.*?)</(?:p|li)>", self.html)]

    @cached_property
    def tables(self) -> dict[str, list[dict[str, str]]]:
        """Caption -> rows, each column -> cell; columns without a name are numbered."""
        found = {}
        for body in re.findall(r"<table>(.*?)</table>", self.html, re.DOTALL):
            columns = re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", body.partition("</thead>")[0])
            names = [plain(name) or str(place) for place, name in enumerate(columns)]
            rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body.partition("<tbody>")[2], re.DOTALL)
            cells = [re.findall(r"<(t[hd])\b[^>]*>(.*?)</\1>", row, re.DOTALL) for row in rows]
            caption = plain(re.findall(r"<caption><b>(.*?)</b>", body)[0])
            found[caption] = [
                dict(zip(names, (plain(cell) for _, cell in row), strict=True)) for row in cells
            ]
        return found

    @cached_property
    def strong(self) -> list[str]:
        """The text of highlighted rows of tables."""
        rows = re.findall(r'<tr class="strong">(.*?)</tr>', self.html, re.DOTALL)
        return [" ".join(plain(cell) for cell in re.split("</t[hd]>", row)).strip() for row in rows]

    @cached_property
    def charts(self) -> dict[str, Chart]:
        """Title -> chart."""
        broad = re.sub(r'<div class="narrow">.*?</div>', "", self.html, flags=re.DOTALL)
        pictures = re.findall(r"<svg .*?</svg>", broad, re.DOTALL)
        return {plain(re.findall(r"<title .*?</title>", svg)[0]): Chart(svg) for svg in pictures}


@dataclass(frozen=True)
class Chart:
    """The SVG of a chart; every number is read from pixels, and is exact to a few tenths of one."""

    svg: str

    @cached_property
    def texts(self) -> list[str]:
        return [plain(text) for *_, text in _TEXT.findall(self.svg)]

    @cached_property
    def description(self) -> str:
        return plain(re.findall(r"<desc .*?</desc>", self.svg)[0])

    @cached_property
    def across(self) -> _Axis:
        """The horizontal axis of a line chart, or that of bars and dots."""
        kind = "axis" if self._levels else "grid"
        line = rf'<line class="{kind}" x1="({_NUMBER})" x2="\1"[^>]*/>\s*'
        text = r'<text class="(?:mid|end)"[^>]*>(.*?)</text>'
        return _Axis([(float(x), plain(name)) for x, name in re.findall(line + text, self.svg)])

    @cached_property
    def up(self) -> _Axis:
        """The vertical axis of a line chart."""
        return _Axis(self._levels)

    @cached_property
    def _levels(self) -> list[tuple[float, str]]:
        line = rf'<line class="grid" x1="66" x2="{_NUMBER}" y1="({_NUMBER})" y2="\1"/>'
        text = r'<text class="end"[^>]*>(.*?)</text>'
        return [(float(y), plain(name)) for y, name in re.findall(line + text, self.svg)]

    @cached_property
    def styles(self) -> dict[str, int]:
        """Name in the legend -> style; a chart of one line has no legend."""
        keys = rf'<(?:path|circle) class="[sm](\d)"(?:(?!<text).)*?<text class="" x="{_NUMBER}"'
        keys += rf' y="{_NUMBER}">(.*?)</text>'
        return {plain(name): int(style) for style, name in re.findall(keys, self.svg)}

    def line(self, style: int = 0) -> list[Point]:
        """Return the pixels of the line of a style, without that in the legend."""
        paths = re.findall(rf'class="s{style}" d="([^"]*)"', self.svg)
        return [
            (float(x), float(y))
            for path in paths
            if not path.endswith("h24")
            for x, y in re.findall(rf"[ML]({_NUMBER}) ({_NUMBER})", path)
        ]

    def marks(self, style: int = 0) -> list[Point]:
        """Return the middles of the marks of a style, in pixels; that in the legend comes first."""
        return _marks(self.svg, style)

    def values(self, style: int = 0, *, log: bool = False) -> list[Point]:
        """Return the values of the line of a style: those across, and those up."""
        return [(self.across.value(x), self.up.value(y, log=log)) for x, y in self.line(style)]

    def heights(self, style: int = 0, *, log: bool = False) -> list[float]:
        """Return the values up of the line of a style."""
        return [self.up.value(y, log=log) for _, y in self.line(style)]

    def whiskers(self, style: int = 0) -> list[Point]:
        """Return the lowest and the highest value of each whisker."""
        found = re.findall(
            rf'class="w{style}" d="M{_NUMBER} ({_NUMBER})h8m-4 0V({_NUMBER})', self.svg
        )
        return [(self.up.value(float(low)), self.up.value(float(high))) for low, high in found]

    @cached_property
    def rows(self) -> dict[str, str]:
        """Name -> the SVG of a row of bars or dots."""
        pieces = re.split(r'<text class="end"[^>]*><title>(.*?)</title>[^<]*</text>', self.svg)[1:]
        return {plain(name): svg for name, svg in zip(pieces[::2], pieces[1::2], strict=True)}

    def bar(self, name: str) -> tuple[float | None, float | None, str]:
        """Return the value, the end of the outline, and the note of a bar."""
        ends = {
            kind: self.across.value(float(x) + float(width))
            for kind, x, width in re.findall(
                rf'<rect class="(\w+)" x="({_NUMBER})" y="{_NUMBER}" width="({_NUMBER})"',
                self.rows[name],
            )
        }
        return ends.get("bar"), ends.get("ghost"), plain(_TEXT.findall(self.rows[name])[0][3])

    def dots(self, name: str, styles: int, *, log: bool = False) -> list[float]:
        """Return the values of the dots of a row, by style."""
        return [
            self.across.value(x, log=log)
            for style in range(styles)
            for x, _ in _marks(self.rows[name], style)
        ]


@dataclass(frozen=True)
class _Axis:
    ticks: Sequence[tuple[float, str]]

    def value(self, pixel: float, *, log: bool = False) -> float:
        (low, first), (high, last) = self.ticks[0], self.ticks[-1]
        ends = [amount(first), amount(last)]
        ends = [math.log10(end) for end in ends] if log else ends
        exact = ends[0] + (pixel - low) / (high - low) * (ends[1] - ends[0])
        return 10**exact if log else exact


def _marks(svg: str, style: int) -> list[Point]:
    across, up = _MIDDLES[style]
    found = re.findall(rf'class="m{style}" (?:d="M|cx=")({_NUMBER})(?: |" cy=")({_NUMBER})', svg)
    return [(float(x) + across, float(y) + up) for x, y in found]
