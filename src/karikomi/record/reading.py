"""Read a record as a stream: its rows in order, the newest row of a kind, and counts of steps."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from karikomi.errors import BadFile
from karikomi.files import as_path

SCHEMA = 1
"""Version of the rows; the first row of every record carries it."""

FIRST: dict[str, Any] = {"event": "start", "schema": SCHEMA}
FIRST_LINE = json.dumps(FIRST).encode() + b"\n"
_LONGEST_FIRST_LINE = 1 << 16


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record; an incomplete last line after a crash is left out.

    Raises `BadFile` for a file that is not a record or of a later version, and, naming the line, for
    a line that is not a JSON object.
    """
    path = as_path(path)
    with opened(path) as stream:
        for number, line in enumerate(stream, start=1):
            # Each complete row ends with a newline, so text after the last one is incomplete.
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadFile(
                    "this line is not JSON", where=f"{path}:{number}", got=error
                ) from error
            if not isinstance(row, dict):
                raise BadFile("this line is not a JSON object", where=f"{path}:{number}")
            yield row


def tally(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Return the number of steps in the rows, and of clipped and skipped ones.

    Steps that a record at its bound left out are included, by the counts in its rows.

    >>> left = {"steps": 3, "clipped": 1, "skipped": 0, "norm": 2.0}
    >>> tally([{"event": "step", "clipped": True, "left_out": left}, {"event": "epoch"}])
    {'steps': 4, 'clipped': 2, 'skipped': 0}
    """
    total = {"steps": 0, "clipped": 0, "skipped": 0}
    for row in rows:
        if row.get("event") == "step":
            step = {"steps": 1, **{key: bool(row.get(key)) for key in ("clipped", "skipped")}}
            left = row.get("left_out", {})
            total = {key: total[key] + step[key] + left.get(key, 0) for key in total}
    return total


def whole_length(path: Path) -> int:
    """Return the length in bytes up to the end of the last whole row, after checking the first."""
    with opened(path) as stream:
        return _rfind(stream, b"\n", stream.seek(0, os.SEEK_END)) + 1


def latest(path: Path, event: str, end: int) -> dict[str, Any] | None:
    """Return the newest row of this event within the first `end` bytes, or None.

    It is found by its text, which begins with the event: see `Recorder.write`.
    """
    with opened(path) as stream:
        start = _rfind(stream, f'\n{{"event": {json.dumps(event)}'.encode(), end) + 1
        if not start:
            return None
        stream.seek(start)
        return json.loads(stream.readline())


def ends_a_row(path: Path, place: int) -> bool:
    """Return whether a row ends at this place, counted in bytes."""
    with opened(path) as stream:
        stream.seek(place - 1)
        return stream.read(1) == b"\n"


def opened(path: Path) -> BinaryIO:
    """Open a record for reading; raise `BadFile` if it is not a record, or of a later version."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise BadFile("cannot read the record", where=str(path), got=error.strerror) from error
    try:
        line = stream.readline(_LONGEST_FIRST_LINE)
        _check(_schema(line), path)
    except BaseException:
        stream.close()
        raise
    stream.seek(0)
    return stream


def _schema(line: bytes) -> int:
    # An incomplete line must be the beginning of FIRST_LINE, else the file is not a record.
    if not line.endswith(b"\n"):
        return SCHEMA if FIRST_LINE.startswith(line) else 0
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return 0
    schema = row.get("schema") if isinstance(row, dict) and row.get("event") == "start" else 0
    return schema if type(schema) is int else 0


def _check(schema: int, path: Path) -> None:
    if schema > SCHEMA:
        raise BadFile(
            "the record is from a later version",
            where=str(path),
            got=f"schema {schema}",
            allowed=SCHEMA,
            hint="upgrade karikomi",
        )
    if schema != SCHEMA:
        raise BadFile(
            "not a record of karikomi",
            where=str(path),
            hint="choose another name for the record",
        )


def _rfind(stream: BinaryIO, text: bytes, end: int) -> int:
    if end == 0:
        return -1
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.rfind(text, 0, end)
