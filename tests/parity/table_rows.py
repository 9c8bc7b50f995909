"""The tables of equivalents in the documentation: their rows, and the code that the sections set up for them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "coming-from.md"


@dataclass(frozen=True)
class TableRow:
    """A row of a table: the peer's cell, ours, and the difference."""

    section: str
    theirs: str
    ours: str
    difference: str

    @property
    def differs(self) -> bool:
        """Whether the results are not the same by design."""
        return self.difference.startswith("*differs*")

    @property
    def calls(self) -> tuple[str, str]:
        """The code of both cells, for tables of which each cell is one piece of code."""
        found = code(self.theirs), code(self.ours)
        assert all(found), f"{self}: a cell of this table is one piece of code"
        return found

    def __str__(self) -> str:
        return f"{self.section}: {self.theirs}"[:80]


@cache
def table_rows(section: str, page: Path = PAGE) -> tuple[TableRow, ...]:
    """Return the rows of the table of a section."""
    cells = [
        [cell.strip() for cell in line.strip("| \n").split(" | ")]
        for line in _text(section, page).splitlines()
        if line.startswith("| ") and not line.startswith("| ---")
    ][1:]
    assert cells, f"{section} of {page.name} has no table"
    return tuple(TableRow(section, *(row + [""])[:3]) for row in cells)


def code(cell: str) -> str:
    """Return the code of a cell, without its backticks."""
    found = re.findall(r"`([^`]+)`", cell)
    return found[0] if len(found) == 1 and cell == f"`{found[0]}`" else ""


def set_up(*sections: str, **names: Any) -> dict[str, Any]:
    """Return the names that the code blocks of these sections define."""
    for section in sections:
        for block in re.findall(r"```python\n(.*?)```", _text(section, PAGE), re.DOTALL):
            exec(block, names)
    return names


def _text(section: str, page: Path) -> str:
    parts = re.split(r"^## (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[section]
