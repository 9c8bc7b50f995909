"""A page as data: sections of words, tables and charts, and the one template that draws them.

A page is one file: styles inline, no scripts, and a policy in its head that forbids it to load anything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jinja2
from markupsafe import Markup

from karikomi.errors import InvalidArgument
from karikomi.files import write_text


@dataclass(frozen=True, slots=True)
class Words:
    """A paragraph; a `warning` is highlighted."""

    kind: ClassVar[str] = "words"
    text: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Points:
    """A list of short statements; `warning` highlights them."""

    kind: ClassVar[str] = "points"
    items: Sequence[str]
    warning: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of formatted cells; the first `names` columns are text, the rest figures.

    `strong`: indices of highlighted rows.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1
    strong: Sequence[int] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with its caption and a note."""

    kind: ClassVar[str] = "chart"
    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to copy."""

    kind: ClassVar[str] = "code"
    caption: str
    text: str


Part = Words | Points | Table | Chart | Code


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure of the headline."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and its parts."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True, slots=True)
class Page:
    """A whole page; its warnings stand before its figures."""

    title: str
    lead: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    closing: str = ""
    warnings: Sequence[str] = ()


def render(page: Page) -> str:
    """Return the HTML of a page; every text in it is escaped.

    >>> "&lt;script&gt;" in render(Page("<script>", "", [], []))
    True
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("karikomi.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html").render(page=page)
    # JSON can contain halves of surrogate pairs and zero bytes, which are invalid in HTML.
    return (
        html.encode("utf-8", "replace").decode("utf-8").replace("\0", "\N{REPLACEMENT CHARACTER}")
    )


def write_page(path: str | os.PathLike[str], html: str) -> Path:
    """Write a page to `path` atomically: a reader gets the old page or the whole new one.

    Raises `InvalidArgument` for anything but text and `Unwritable` when the disk or a permission
    refuses.
    """
    if not isinstance(html, str):
        raise InvalidArgument("the page must be text", where="write_page", got=type(html).__name__)
    return write_text(path, html)
