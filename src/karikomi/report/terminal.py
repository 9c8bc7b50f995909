"""Plain tables for a terminal: aligned columns of 80 characters, without colours or boxes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from karikomi.report.wording import shorten

WIDTH = 80


def align(rows: Sequence[Sequence[str]], *, left: int = 1, width: int = WIDTH) -> list[str]:
    """Return rows as lines: the first `left` columns flush left, figures flush right.

    When a line would exceed `width`, the widest of the left columns is shortened in the middle of its
    texts.

    >>> align([["name", "size"], ["fc1.weight", "1.20 kB"], ["fc1.bias", "90 B"]])
    ['name           size', 'fc1.weight  1.20 kB', 'fc1.bias       90 B']
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    if not cells:
        return []
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    while excess > 0:
        widest = max(range(left), key=lambda column: widths[column])
        if widths[widest] <= 8:
            break
        taken = min(excess, max(widths[widest] // 4, 1), widths[widest] - 8)
        widths[widest] -= taken
        excess -= taken
    return [
        "  ".join(
            shorten(cell, size, "..").ljust(size) if column < left else cell.rjust(size)
            for column, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def printable(value: Any) -> str:
    """Return one line of text without control characters: a name may come from an untrusted file.

    >>> printable("a\\x1b[31mb")
    'a?[31mb'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))


def wrap(text: str, width: int = WIDTH) -> list[str]:
    """Return a long text as lines that fit; those after the first are indented.

    >>> wrap("one two three", 8)
    ['one two', '  three']
    """
    return textwrap.wrap(text, width, subsequent_indent="  ")


def warning_lines(warnings: Sequence[str]) -> list[str]:
    """Return warnings as lines; a long one goes on in the next line, none is cut."""
    return [line for text in warnings for line in wrap(f"warning: {printable(text)}")]


def text_block(lines: Sequence[str]) -> str:
    """Return lines as one text, without spaces or empty lines at its ends."""
    return "\n".join(line.rstrip() for line in lines).strip("\n")
