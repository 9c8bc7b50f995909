"""An append-only file of lines, with buffered appends and truncation to a checkpoint."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from karikomi.errors import BadFile, Unwritable
from karikomi.record.reading import ends_a_row, whole_length


class Journal:
    """A file of lines; an existing one is continued, without an incomplete last line after a crash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = 0
        """Length of the file in bytes, pending lines included."""
        self._pending: list[bytes] = []
        if path.exists():
            self.length = whole_length(path)
            if self.length < path.stat().st_size:
                os.truncate(path, self.length)

    def append(self, line: bytes) -> None:
        """Add a line to those pending."""
        self._pending.append(line)
        self.length += len(line)

    def drain(self) -> None:
        """Write the pending lines; they stay pending if that raises `Unwritable`."""
        place: int | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as stream:
                place = stream.tell()
                stream.write(b"".join(self._pending))
        except OSError as error:
            if place is not None:
                # Some rows may be in the file; the next call writes all of them again.
                with contextlib.suppress(OSError):
                    os.truncate(self.path, place)
            raise Unwritable(
                f"cannot append to the record ({error.strerror or error})", where=str(self.path)
            ) from error
        self._pending.clear()
        self.length = self.path.stat().st_size

    def cut(self, place: int) -> None:
        """Truncate the file at `place`, in bytes, and drop the pending lines.

        Raises `BadFile`, and changes nothing, if the file is shorter or no line ends there.
        """
        length = self.path.stat().st_size if self.path.exists() else 0
        if length < place or not ends_a_row(self.path, place):
            shorter = "the record is shorter than in its checkpoint"
            raise BadFile(
                shorter if length < place else "no row ends at the position in the checkpoint",
                where=str(self.path),
                got=f"{length} bytes",
                allowed=f">= {place}" if length < place else f"a row that ends at {place}",
                hint="start afresh in another folder",
            )
        os.truncate(self.path, place)
        self._pending.clear()
        self.length = place
