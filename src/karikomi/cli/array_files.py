"""Named arrays from a file that a user gives: .karikomi, .safetensors or .npz, by its ending."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import safetensors

from karikomi import pack
from karikomi.errors import BadFile, InvalidArgument, Unsupported
from karikomi.pack import plain

ENDINGS = (".karikomi", ".safetensors", ".npz")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file by name.

    Raises `BadFile` for a file that is missing, damaged or hostile, or holds types that cannot be
    stored, `InvalidArgument` for another ending. Nothing in a file is ever run.
    """
    readers = dict(zip(ENDINGS, (pack.load, plain.read, _npz), strict=True))
    if not path.is_file():
        raise BadFile("there is no such file", where=str(path))
    if path.suffix not in readers:
        raise InvalidArgument(
            "unsupported kind of file",
            where=str(path),
            got=repr(path.suffix),
            allowed=", ".join(ENDINGS),
        )
    try:
        return readers[path.suffix](path)
    except OSError as error:
        raise BadFile(
            f"cannot read the file ({error.strerror or error})", where=str(path)
        ) from error
    except MemoryError as error:
        raise BadFile("not enough memory for its arrays", where=str(path)) from error


def read_notes(path: Path) -> dict[str, str]:
    """Return the notes of a file, such as what a shrink left of its network; none for a .npz file."""
    if path.suffix == ".karikomi":
        return pack.inspect(path).notes
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="numpy") as stored:
            return stored.metadata() or {}
    return {}


def refuse_same(source: Path, out: Path) -> None:
    """Raise `Unsupported` where a verb would overwrite the file that it reads."""
    if out.exists() and source.exists() and out.samefile(source):
        raise Unsupported(
            "the output is the input", where=str(out), hint="give the output another name"
        )


def _npz(path: Path) -> dict[str, np.ndarray]:
    most = pack.Budget().decoded
    try:
        with zipfile.ZipFile(path) as archive:
            needed = sum(member.file_size for member in archive.infolist())
        if needed > most:
            raise BadFile("too large", where=str(path), got=f"{needed} bytes", allowed=f"<= {most}")
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError, NotImplementedError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile("not a .npz file of arrays", where=str(path), got=error) from error
