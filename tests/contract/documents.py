"""Tables of the documentation as rows of code, for tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

_CELL = re.compile(r"`([^`]*)`")


def rows(page: Path, first: str, section: str | None = None) -> list[tuple[str, str]]:
    """Return the code of the first two columns of the tables whose first heading is `first`.

    `section`: the heading that they stand under, none for all of the page.
    """
    found: list[tuple[str, str]] = []
    heading, inside = "", False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if cells[0] == first:
            inside = section in (None, heading)
        elif inside and not set(cells[0]) <= set("- "):
            (theirs,), ours = _CELL.findall(cells[0]), _CELL.findall(cells[1])
            found.append((theirs, ours[0]))
    return found
