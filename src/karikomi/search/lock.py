"""A folder is of one process at a time, and of one run; the lock is released when a process dies."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from karikomi.errors import BadFile, Unsupported, Unwritable
from karikomi.files import write_json

AFRESH = "delete the folder, or choose another --out, and start afresh"


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
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        stream.close()
        raise Unsupported(
            "another process is at work in this folder",
            where=str(folder),
            hint="wait for it, or choose another --out",
        ) from error
    return stream


def claim(path: Path, identity: Mapping[str, Any]) -> bool:
    """Write the identity of a run to `path`, and return whether it was there before.

    Raises `Unsupported`, naming the keys, where the identity of another run is there.
    """
    known = read_json(path)
    # Through JSON, so that what was read compares with what would be written.
    wanted = json.loads(json.dumps(dict(identity)))
    if known is None:
        write_json(path, wanted)
        return False
    differing = sorted(key for key in {*known, *wanted} if known.get(key) != wanted.get(key))
    if differing:
        first = differing[0]
        raise Unsupported(
            f"the folder holds another run; different: {', '.join(differing)}",
            where=str(path.parent),
            got=f"{first} = {wanted.get(first)}, there {known.get(first)}",
            hint="choose another --out, or delete the folder",
        )
    return True


def read_json(path: Path, *, hint: str = AFRESH) -> dict[str, Any] | None:
    """Return the table in a JSON file of a run folder, ``None`` where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise Unwritable("the output folder is a file", where=str(path.parent)) from error
    except (OSError, ValueError) as error:
        raise BadFile(
            "a file of the run folder cannot be read", where=str(path), got=error, hint=hint
        ) from error
    if not isinstance(content, dict):
        raise BadFile("not a file of a run", where=str(path), hint=hint)
    return content
