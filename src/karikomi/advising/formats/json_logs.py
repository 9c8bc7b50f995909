"""JSON of other tools: Hugging Face ``trainer_state.json``, and histories of W&B as a list, as lines, or as columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from karikomi.advising.formats.keyed import LoggedCurves, as_number
from karikomi.errors import BadFile

STATE = "trainer_state.json of Hugging Face"
HISTORY = "history of W&B"
MOST_BYTES = 1 << 30
STEPS = ("_step", "step", "global_step", "iteration", "iter", "steps")


def read_json(path: Path, step: str | None) -> tuple[LoggedCurves, str, list[str], dict[str, Any]]:
    """Return the curves of a JSON file, its format, what was lost, and facts; raises `BadFile`."""
    content, lost = _content(path)
    if isinstance(content, dict) and isinstance(content.get("log_history"), list):
        curves = LoggedCurves()
        # Rows of evaluations have no norm, and a loss of their own name.
        lost += add_rows(curves, content["log_history"], step or "step")
        return curves, STATE, lost, {}
    if isinstance(content, dict):
        content = _transposed(content)
    if not isinstance(content, list):
        raise BadFile("this JSON holds no rows", where=str(path), got=type(content).__name__)
    curves = LoggedCurves()
    lost += add_rows(curves, content, step)
    return curves, HISTORY, lost, {}


def add_rows(curves: LoggedCurves, rows: Iterable[Any], step: str | None = None) -> list[str]:
    """Add rows, each a mapping of key -> value, and return what was lost.

    A key that a row lacks, or whose value is ``None`` or empty, has no point there.
    """
    bad = without = 0
    for row in rows:
        if not isinstance(row, Mapping):
            bad += 1
            continue
        keys = STEPS if step is None else (step,)
        number = next((n for key in keys if (n := as_number(row.get(key))) is not None), None)
        if number is None or number != number or abs(number) > 1e15:
            without += 1
            continue
        for key, value in row.items():
            exact = as_number(value)
            if exact is not None and key not in keys:
                curves.add(str(key), int(number), exact)
    return [
        f"{count:,} rows {what}"
        for count, what in ((bad, "that are no tables"), (without, "without a step"))
        if count
    ]


def _content(path: Path) -> tuple[Any, list[str]]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise BadFile("the file is too large", where=str(path), allowed=f"{MOST_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BadFile("cannot read the file", where=str(path), got=error.strerror) from error
    try:
        return json.loads(text), []
    except RecursionError as error:
        raise BadFile("this JSON is nested too deep", where=str(path)) from error
    except ValueError as error:
        rows, wrong = _lines(text)
        if not rows:
            raise BadFile("this is not JSON", where=str(path), got=error) from error
        return rows, [f"{wrong:,} lines that are not JSON"] if wrong else []


def _lines(text: str) -> tuple[list[Any], int]:
    rows, wrong = [], 0
    for line in text.splitlines():
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                wrong += 1
                continue
            rows.append(row) if isinstance(row, dict) else None
            wrong += not isinstance(row, dict)
    return rows, wrong


def _transposed(content: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the rows of columns, each a list or a table of row -> value (as pandas writes them)."""
    columns = {
        key: list(value.values()) if isinstance(value, dict) else value
        for key, value in content.items()
        if isinstance(value, dict | list)
    }
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1:
        return None
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
