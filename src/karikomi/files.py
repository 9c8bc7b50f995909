"""Atomic writes: temporary file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from karikomi.errors import InvalidArgument, Unwritable

# Binary: Windows would otherwise turn newlines into two bytes.
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def as_path(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a `Path`; raise `InvalidArgument` for one with a NUL character.

    >>> as_path("runs/a").name
    'a'
    """
    plain = Path(path)
    if "\0" in str(plain):
        raise InvalidArgument("a path cannot hold a NUL character", got=repr(str(plain)))
    return plain


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[BinaryIO], None], *, durable: bool = True
) -> Path:
    """Call ``write(stream)`` on a temporary file beside `path`, then rename it to `path`.

    Afterwards `path` has either the whole new content or its previous content; a failure (a full disk,
    a missing permission) removes the temporary file and raises `Unwritable`. `durable`: wait for the
    disk, so that this also holds after a power failure and not only after a killed process.
    Raises `InvalidArgument` as `as_path` does.
    """
    path = as_path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.parent / f".{path.name}.{secrets.token_hex(8)}.part"
        # Not tempfile: its files are readable by one user only, and reading the umask means setting it.
        descriptor = os.open(name, _NEW, 0o666)
        temporary = name
        with os.fdopen(descriptor, "wb") as stream:
            write(stream)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
        temporary = None
        if durable:
            _sync_folder(path.parent)
    except OSError as error:
        raise Unwritable(
            f"cannot write the file ({error.strerror or error})",
            where=str(path),
            hint="free space or choose another folder; nothing was left under this name",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def write_bytes(path: str | os.PathLike[str], content: bytes, *, durable: bool = True) -> Path:
    """Write `content` to `path` atomically."""

    def write(stream: BinaryIO) -> None:
        stream.write(content)

    return write_atomically(path, write, durable=durable)


def write_text(path: str | os.PathLike[str], content: str) -> Path:
    """Write `content` to `path` atomically, as UTF-8."""
    return write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """Write `content` to `path` atomically, as JSON with sorted keys and a closing newline."""
    return write_text(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def tensor_file(arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return named arrays, which may lie in memory in any order, as the bytes of a safetensors file.

    The library (0.8) writes the memory of an array as it lies: one with other strides, as a weight in channels-last
    order has, comes back with its entries mixed up and without an error. So all are laid out in C order first.

    >>> import numpy as np, safetensors.numpy
    >>> turned = np.arange(6.0).reshape(2, 3).T
    >>> bool(np.array_equal(safetensors.numpy.load(tensor_file({"w": turned}))["w"], turned))
    True
    """
    import numpy as np
    import safetensors.numpy

    # Not `ascontiguousarray`, which gives a scalar an axis.
    laid_out = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return safetensors.numpy.save(laid_out, None if metadata is None else dict(metadata))


def _sync_folder(folder: Path) -> None:
    # Without this the rename itself may be lost on power failure. Windows cannot open folders.
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
