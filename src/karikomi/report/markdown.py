"""A page as Markdown, for the comment of a pull request: the same sections, tables and words, without drawings."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

from karikomi.report.page import Chart, Code, Page, Part, Points, Section, Table, Words

MOST_LETTERS = 60_000
"""GitHub takes comments of up to 65,536 letters."""

# What would format, link, mention a person (@), name an issue (#) or start a tag.
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


def markdown(page: Page, *, opened: int = 2) -> str:
    """Return a page as GitHub's Markdown: title, warnings and figures, `opened` sections, and the others folded.

    Charts are left out: tables beside them have their numbers. Sections beyond 60,000 letters are left out and named.

    >>> print(markdown(Page("What changed", "a against b", [], [Section("Not checked", [Points(["slices: none"])])])))
    ## What changed
    <BLANKLINE>
    a against b
    <BLANKLINE>
    ### Not checked
    <BLANKLINE>
    - slices: none
    """
    blocks = [f"## {escaped(page.title)}", escaped(page.lead)]
    blocks += ["\n".join(f"- **Warning**: {escaped(text)}" for text in page.warnings)]
    if page.tiles:
        rows = [(tile.name, tile.value, tile.note) for tile in page.tiles]
        blocks.append(_rows(("", "", ""), rows, names=3))
    taken, lost = sum(map(len, blocks)), []
    for place, section in enumerate(page.sections):
        text = _section(section, folded=place >= opened)
        if taken + len(text) > MOST_LETTERS:
            lost.append(section.title)
            continue
        taken += len(text)
        blocks.append(text)
    if lost:
        blocks.append(escaped(f"Left out, as comments are short: {', '.join(lost)}."))
    return "\n\n".join(block for block in [*blocks, escaped(page.closing)] if block)


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, in one line.

    >>> escaped("class_drop>0.03@holm | #7")
    'class\\\\_drop\\\\>0.03&#64;holm \\\\| \\\\#7'
    """
    return _SPECIAL.sub(r"\\\1", " ".join(text.split())).replace("@", "&#64;")


def _section(section: Section, *, folded: bool) -> str:
    parts = "\n\n".join(text for part in section.parts if (text := "\n".join(_part(part))))
    if not parts:
        return ""
    if folded:
        title = html.escape(section.title).replace("@", "&#64;")
        return f"<details><summary>{title}</summary>\n\n{parts}\n\n</details>"
    return f"### {escaped(section.title)}\n\n{parts}"


def _part(part: Part) -> Iterator[str]:
    if isinstance(part, Words):
        yield f"**{escaped(part.text)}**" if part.warning else escaped(part.text)
    elif isinstance(part, Points):
        yield from (f"- {escaped(item)}" for item in part.items)
    elif isinstance(part, Table):
        yield _rows(part.columns, part.rows, names=part.names, strong=part.strong)
        if part.note:
            yield f"\n{escaped(part.note)}"
    elif isinstance(part, Code):
        # Longer than any run of backticks inside, as a name may come from a file.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", part.text)), default=0))
        yield f"{fence}\n{part.text}\n{fence}"
    else:
        assert isinstance(part, Chart)  # noqa: S101  (the last of the five kinds; its table has the numbers)


def _rows(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    names: int,
    strong: Sequence[int] = (),
) -> str:
    lines = [
        "| " + " | ".join(map(escaped, columns)) + " |",
        "|" + "|".join("---" if place < names else "---:" for place in range(len(columns))) + "|",
    ]
    for place, row in enumerate(rows):
        cells = [escaped(cell) for cell in row]
        cells = [f"**{cell}**" if cell and place in strong else cell for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
