"""A journal in JSONL: buffered appends, rewound to a checkpoint's place when a run resumes."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from niwaki.errors import BadFile, InvalidArgument, Unwritable
from niwaki.files import as_path

SCHEMA = 1
"""Version of the rows; the first row of every record carries it."""

_FIRST = {"event": "start", "schema": SCHEMA}
_FIRST_LINE = json.dumps(_FIRST).encode() + b"\n"


class Recorder:
    """Append rows to a JSONL file, flushing every `flush_every` rows.

    A non-finite number is written as ``null``, since JSON has none. Use it as a context manager, or
    call `close`. An existing record is continued, without a last line that a crash cut short.

    Raises `BadFile`, and leaves the file as it is, for one that is no record or a later version's;
    `Unwritable` when the disk does not take a row, `InvalidArgument` for what JSON cannot say.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "record.jsonl"
    >>> with Recorder(path) as recorder:
    ...     recorder.write({"event": "step", "loss": 0.5})
    >>> [row["event"] for row in read(path)]
    ['start', 'step']
    """

    def __init__(self, path: str | os.PathLike[str], *, flush_every: int = 100) -> None:
        self.path = as_path(path)
        self._flush_every = flush_every
        self._pending: list[str] = []
        if self._whole_length() == 0:
            self.write(_FIRST)
            self.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row."""
        plain = {key: _plain(value, key) for key, value in row.items()}
        self._pending.append(json.dumps(plain, allow_nan=False))
        if len(self._pending) >= self._flush_every:
            self.flush()

    def flush(self) -> int:
        """Write what is pending and return the length of the file in bytes: the place to rewind to."""
        place: int | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as stream:
                place = stream.tell()
                stream.write("".join(f"{row}\n" for row in self._pending).encode("utf-8"))
        except OSError as error:
            if place is not None:
                # Half of the rows may stand there; the next flush writes all of them again.
                with contextlib.suppress(OSError):
                    os.truncate(self.path, place)
            raise Unwritable(
                f"cannot append to the record ({error.strerror or error})", where=str(self.path)
            ) from error
        self._pending.clear()
        return self.path.stat().st_size

    def rewind(self, place: int) -> None:
        """Drop everything after `place`: rows that a killed run wrote after its last checkpoint."""
        self._pending.clear()
        length = self.path.stat().st_size if self.path.exists() else 0
        if length < place:
            raise BadFile(
                "the record is shorter than its checkpoint says",
                where=str(self.path),
                got=f"{length} bytes",
                allowed=f">= {place}",
                hint="start afresh in another folder",
            )
        os.truncate(self.path, place)

    def close(self) -> None:
        """Write what is pending."""
        self.flush()

    def _whole_length(self) -> int:
        if not self.path.exists():
            return 0
        content = _content(self.path)
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        return whole

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a record; a last line that a crash cut short is left out.

    Raises `BadFile` for a file that is no record or a later version's, and, naming the line, for
    anything else that is no JSON object.
    """
    path = as_path(path)
    lines = _content(path).split(b"\n")
    # A whole record ends with a newline, so what follows the last one was cut short.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadFile("this line is no JSON", where=f"{path}:{number}", got=error) from error
        if not isinstance(row, dict):
            raise BadFile("this line is no JSON object", where=f"{path}:{number}")
        yield row


def _content(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadFile("cannot read the record", where=str(path), got=error.strerror) from error
    line, newline, _ = content.partition(b"\n")
    # Without a whole line it must be ours cut short: anything else belongs to somebody else.
    schema = _schema(line) if newline else SCHEMA if _FIRST_LINE.startswith(content) else 0
    if schema > SCHEMA:
        raise BadFile(
            "the record is from a later version",
            where=str(path),
            got=f"schema {schema}",
            allowed=SCHEMA,
            hint="upgrade niwaki",
        )
    if schema != SCHEMA:
        raise BadFile(
            "this is no record of niwaki",
            where=str(path),
            hint="choose another name for the record",
        )
    return content


def _schema(line: bytes) -> int:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return 0
    schema = row.get("schema") if isinstance(row, dict) and row.get("event") == "start" else 0
    return schema if type(schema) is int else 0


def _plain(value: Any, key: str) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(inner): _plain(one, key) for inner, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, key) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InvalidArgument(
        "this value has no place in a record",
        where=f"record: {key}",
        got=type(value).__name__,
        allowed="numbers, text, lists and tables of them",
    )
