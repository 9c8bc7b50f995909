"""Log lines of Megatron-LM and its forks: ``iteration 10/ 100 | ... | lm loss: 8.5E+00 | grad norm: 35.5 |``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from karikomi.advising.formats.keyed import LoggedCurves, as_number
from karikomi.errors import BadFile

FORMAT = "log of Megatron"
_ITERATION = re.compile(r"\biteration\s+(\d{1,15})\s*/\s*\d+", re.IGNORECASE)
_LONGEST = 1 << 16


def is_megatron(path: Path) -> bool:
    """Return whether a line among the first megabytes is one of an iteration."""
    try:
        return any(_ITERATION.search(line) and "|" in line for line in _lines(path, 8 << 20))
    except OSError:
        return False


def read_log(path: Path) -> tuple[LoggedCurves, list[str]]:
    """Return the curves of a log, and what was lost; other lines are passed over.

    Its losses are means since the line before; its norms are those of the last step, before the clip.
    """
    curves, wrong = LoggedCurves(), 0
    try:
        for line in _lines(path, None):
            found = _ITERATION.search(line)
            if found is None or "|" not in line:
                continue
            for part in line[found.end() :].split("|"):
                key, _, text = part.rpartition(":")
                value = as_number(text.strip())
                if not key.strip():
                    continue
                if value is None:
                    wrong += 1
                    continue
                curves.add(" ".join(key.split()).lower(), int(found[1]), value)
    except OSError as error:
        raise BadFile("cannot read the file", where=str(path), got=error.strerror) from error
    return curves, [f"{wrong:,} entries without a number"] if wrong else []


def _lines(path: Path, most: int | None) -> Iterator[str]:
    """Yield lines; one that is longer than any of Megatron's is cut."""
    seen = 0
    with path.open(encoding="utf-8", errors="replace") as stream:
        while line := stream.readline(_LONGEST):
            yield line
            seen += len(line)
            if most is not None and seen > most:
                return
