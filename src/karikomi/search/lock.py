"""One process at a time in a folder; the operating system releases the lock when a process dies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from karikomi.errors import Unsupported, Unwritable


def lock(folder: Path) -> IO[bytes]:
    """Return the open lock file of a folder; closing it, or dying, releases it.

    Raises `Unsupported` when another process (or another call in this one) holds it.
    """
    try:
        stream = (folder / ".lock").open("ab")
    except OSError as error:
        raise Unwritable(
            f"cannot write into the folder ({error.strerror or error})", where=str(folder)
        ) from error
    try:
        _take(stream)
    except OSError as error:
        stream.close()
        raise Unsupported(
            "another process is at work in this folder",
            where=str(folder),
            hint="wait for it, or choose another --out",
        ) from error
    return stream


def _take(stream: IO[bytes]) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
