"""The journal of a search: one line for each finished candidate, written at once and never rewritten."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from karikomi.errors import BadFile, Unsupported, Unwritable
from karikomi.search.driver.proposal import Proposal

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Finished:
    """A candidate that was evaluated: its facts and artefact, or the error that ended it.

    `error`: ``kind``, ``text`` and whether it is ``permanent``: then the same evaluation would fail again, and is
    not retried. `seconds` is for display and decides nothing. `exception`: the error itself, in the process
    that met it.
    """

    key: str
    proposal: Proposal
    facts: Mapping[str, Any] = field(default_factory=dict)
    artefact: str | None = None
    error: Mapping[str, Any] | None = None
    seconds: float = 0.0
    exception: BaseException | None = field(default=None, compare=False, repr=False)

    @property
    def settled(self) -> bool:
        """Whether it need not be evaluated again: it has facts, or failed for good."""
        return self.error is None or bool(self.error.get("permanent"))

    def line(self) -> bytes:
        """Return the line of the journal, with its own digest at the end."""
        values = {
            "artefact": self.artefact,
            "error": None if self.error is None else dict(self.error),
            "facts": dict(self.facts),
            "key": self.key,
            "proposal": self.proposal.settings,
            "seconds": round(self.seconds, 3),
        }
        return _sealed(values)


class RunJournal:
    """The finished candidates of a run folder, as a file of JSON lines.

    Each line is one write to a file that is opened for appending, followed by fsync, so that a process that is
    killed at any moment leaves whole lines and at most one torn one at the end, which is dropped and named in
    `notes`. `identity`: what the result of a candidate depends on beside its proposal: digests of weights, data,
    source, the metric, the seed, the version. It is part of each key, so candidates of another identity stay in the
    file and are not taken.

    Raises `Unsupported` for a journal of another format, which is left as it is, and `BadFile` for a damaged one.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self._identity = path, json.dumps(dict(identity), sort_keys=True)
        self.notes: list[str] = []
        self._finished: dict[str, Finished] = {}
        self._foreign: set[str] = set()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise Unwritable(
                f"cannot open the journal ({error.strerror or error})", where=str(path)
            ) from error
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; all lines are on disk already."""
        os.close(self._descriptor)

    def key_of(self, proposal: Proposal) -> str:
        """Return the key of a candidate: a digest of the identity and the proposal."""
        text = f"{self._identity}\0{proposal.text}"
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def found(self, proposal: Proposal) -> Finished | None:
        """Return the last line of a candidate of this identity, or None."""
        return self._finished.get(self.key_of(proposal))

    def append(self, finished: Finished) -> None:
        """Write one line; when this returns, it is on disk."""
        self._write(finished.line())
        self._finished[finished.key] = finished

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole, _, torn = content.rpartition(b"\n")
        lines = whole.split(b"\n") if whole else []
        if torn:
            self._drop(torn, len(content) - len(torn))
        elif lines and _opened(lines[-1]) is None and len(lines) > 1:
            # A power failure can leave a line whose blocks were not all written.
            self._drop(lines[-1] + b"\n", len(content) - len(lines.pop()) - 1)
        if not lines:
            self._write(_sealed({"format": FORMAT}))
            return
        _check_format(lines[0], self.path)
        for number, line in enumerate(lines[1:], start=2):
            values = _opened(line)
            if values is None:
                raise BadFile(
                    f"line {number} of the journal is damaged",
                    where=str(self.path),
                    hint="restore the file, or choose another --out",
                )
            self._take(values)
        if self._foreign:
            self.notes.append(
                f"{len(self._foreign)} candidates in the journal are of other weights, data, settings or code,"
                " and were not taken"
            )

    def _take(self, values: Mapping[str, Any]) -> None:
        proposal = Proposal.of(**values["proposal"])
        finished = Finished(
            values["key"],
            proposal,
            values["facts"],
            values["artefact"],
            values["error"],
            values["seconds"],
        )
        if finished.key == self.key_of(proposal):
            self._finished[finished.key] = finished
        else:
            self._foreign.add(finished.key)

    def _drop(self, torn: bytes, length: int) -> None:
        os.ftruncate(self._descriptor, length)
        os.fsync(self._descriptor)
        self.notes.append(
            f"the last line of the journal was not whole ({len(torn)} bytes) and was dropped:"
            " its candidate is evaluated again"
        )

    def _write(self, line: bytes) -> None:
        try:
            written = os.write(self._descriptor, line)
            os.fsync(self._descriptor)
        except OSError as error:
            raise Unwritable(
                f"cannot write the journal ({error.strerror or error})",
                where=str(self.path),
                hint="free space; the same command continues",
            ) from error
        if written != len(line):
            raise Unwritable("the disk is full", where=str(self.path), hint="free space")


def _check_format(line: bytes, path: Path) -> None:
    values = _opened(line)
    if values is None or "format" not in values:
        raise BadFile("not a journal of a search", where=str(path), hint="choose another --out")
    if values["format"] != FORMAT:
        raise Unsupported(
            "the journal is of another format, and is left as it is",
            where=str(path),
            got=values["format"],
            allowed=FORMAT,
            hint="finish the run with the version that began it, or choose another --out",
        )


def _sealed(values: Mapping[str, Any]) -> bytes:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    seal = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f'{text[:-1]},"seal":"{seal}"}}\n'.encode()


def _opened(line: bytes) -> dict[str, Any] | None:
    """Return the values of a line, or None where it is not what was written."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    values.pop("seal", None)
    return values if _sealed(values) == line + b"\n" else None
