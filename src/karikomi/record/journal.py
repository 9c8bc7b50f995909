"""A file of lines that only grows: buffered appends, and a way back to a checkpoint's place.

Apart from the recorder, which decides what is written: here are only bytes, a full disk and a crash.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from karikomi.errors import BadFile, Unwritable
from karikomi.record.reading import ends_a_row, whole_length


class Journal:
    """A file of lines; an existing one is continued, without a last line that a crash cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = 0
        """Of the file in bytes, with what is pending."""
        self._pending: list[bytes] = []
        if path.exists():
            self.length = whole_length(path)
            if self.length < path.stat().st_size:
                os.truncate(path, self.length)

    def append(self, line: bytes) -> None:
        """Hold a line to be written."""
        self._pending.append(line)
        self.length += len(line)

    def drain(self) -> None:
        """Write what is pending; it stays pending if that raises `Unwritable`."""
        place: int | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as stream:
                place = stream.tell()
                stream.write(b"".join(self._pending))
        except OSError as error:
            if place is not None:
                # Half of the rows may stand there; the next time all of them are written again.
                with contextlib.suppress(OSError):
                    os.truncate(self.path, place)
            raise Unwritable(
                f"cannot append to the record ({error.strerror or error})", where=str(self.path)
            ) from error
        self._pending.clear()
        self.length = self.path.stat().st_size

    def cut(self, place: int) -> None:
        """Drop all that stands after `place`, in bytes, and what is pending.

        Raises `BadFile`, and changes nothing, if the file is shorter or no line ends there.
        """
        length = self.path.stat().st_size if self.path.exists() else 0
        if length < place or not ends_a_row(self.path, place):
            shorter = "the record is shorter than its checkpoint says"
            raise BadFile(
                shorter if length < place else "no row ends where the checkpoint says",
                where=str(self.path),
                got=f"{length} bytes",
                allowed=f">= {place}" if length < place else f"a row that ends at {place}",
                hint="start afresh in another folder",
            )
        os.truncate(self.path, place)
        self._pending.clear()
        self.length = place
