"""Loading: check everything, decode chunk by chunk, return all tensors or none."""

from __future__ import annotations

import copy
import math
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from karikomi.errors import BadFile, InvalidArgument
from karikomi.pack import header, manifest
from karikomi.pack.codecs.cursor import Cursor
from karikomi.pack.contest import CHUNK, CODECS
from karikomi.pack.grid_codec import read_grid
from karikomi.pack.header import Header
from karikomi.pack.manifest import ManifestEntry
from karikomi.pack.read_budget import Budget
from karikomi.pack.stored import DTYPES, Stored, code_dtype
from karikomi.quantize import Coded

T = TypeVar("T")


class Opened(NamedTuple):
    """A file whose header, directory and manifest agree; its payloads are still unread."""

    header: Header
    entries: list[ManifestEntry]
    equal: dict[str, str]
    notes: dict[str, str]
    stream: BinaryIO
    where: str
    size: int

    def named(self, content: Callable[[Stored], T]) -> dict[str, T]:
        """Return name -> content of each tensor; of equal ones each has its own."""
        others: dict[str, list[str]] = {}
        for name, other in self.equal.items():
            others.setdefault(other, []).append(name)
        found = {}
        for entry, stored in self.tensors():
            found[entry.name] = content(stored)
            found |= {name: copy.copy(found[entry.name]) for name in others.get(entry.name, ())}
        return found

    def tensors(self) -> Iterator[tuple[ManifestEntry, Stored]]:
        """Yield each tensor decoded and verified; raise `BadFile` at the first bad one."""
        for entry in self.entries:
            where = f"{self.where}, tensor {entry.name!r}"
            self.stream.seek(self.header.spans[entry.name][0])
            payload = self.stream.read(entry.size)
            try:
                yield entry, _decode(entry, payload)
            except (BadFile, InvalidArgument) as error:
                raise BadFile(str(error), where=where) from error
            except MemoryError as error:
                raise BadFile("not enough memory for this tensor", where=where) from error


def load(path: str | os.PathLike[str], *, budget: Budget | None = None) -> dict[str, np.ndarray]:
    """Return the tensors of a packed file as NumPy arrays by name.

    Arrays have the shape and type that were saved; quantized ones are float32. Every chunk's
    CRC32 and every tensor's digest is checked. `budget` bounds what is read, by
    default `Budget()`. Raises `BadFile` naming the tensor and the fact; there is no partial result.

    >>> import tempfile
    >>> from karikomi.pack import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load(save({"x": np.arange(3)}, folder + "/x.karikomi"))
    {'x': array([0, 1, 2])}
    """
    with opened(path, budget) as file:
        return file.named(lambda stored: stored.decoded())


def load_coded(
    path: str | os.PathLike[str], *, budget: Budget | None = None
) -> dict[str, np.ndarray | Coded]:
    """Return the tensors as they were given to `save`: quantized ones as codes with their grid.

    Checks and errors as for `load`.
    """
    return load_with_notes(path, budget=budget)[0]


def load_with_notes(
    path: str | os.PathLike[str], *, budget: Budget | None = None
) -> tuple[dict[str, np.ndarray | Coded], dict[str, str]]:
    """Return the tensors as `load_coded` does, and the notes."""
    with opened(path, budget) as file:
        return file.named(lambda stored: stored.value()), file.notes


@contextmanager
def opened(path: str | os.PathLike[str], budget: Budget | None = None) -> Iterator[Opened]:
    """Open a packed file and check all that can be checked without its payloads."""
    budget = budget or Budget()
    path = Path(path).expanduser()
    where = str(path)
    try:
        # Before opening: a pipe would wait for its writer for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadFile("not a regular file", where=where)
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = header.read(stream, size, budget, where)
            entries, equal, notes = manifest.load(head.manifest, head.version, budget, where)
            _require_agreement(entries, head, where)
            sizes = {entry.name: entry.decoded_size for entry in entries}
            decoded = sum(sizes.values()) + sum(sizes[other] for other in equal.values())
            budget.admit_decoded(decoded, size, where)
            yield Opened(head, entries, equal, notes, stream, where, size)
    except (OSError, ValueError) as error:
        if isinstance(error, BadFile):
            raise
        raise BadFile(f"cannot be read ({error})", where=where) from error


def _require_agreement(entries: list[ManifestEntry], head: Header, where: str) -> None:
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names) or set(names) != set(head.spans):
        raise BadFile("manifest and directory name different tensors", where=where)
    for entry in entries:
        start, end = head.spans[entry.name]
        if entry.size != end - start:
            raise BadFile(
                "the chunks do not fill the payload",
                where=f"{where}, tensor {entry.name!r}",
                got=entry.size,
                allowed=end - start,
            )


def _decode(entry: ManifestEntry, payload: bytes) -> Stored:
    cursor = Cursor(payload)
    parts = [_verified(cursor, index, chunk) for index, chunk in enumerate(entry.chunks)]
    tables = Cursor(parts[0])
    grid = read_grid(tables, entry.grid, entry.shape)
    head = tables.rest()
    dtype = code_dtype(entry.dtype, grid)
    flat = np.empty(math.prod(entry.shape), dtype)
    if not flat.size and head:
        raise BadFile("tables for a tensor without elements")
    for index, data in enumerate(parts[1:]):
        part = flat[index * CHUNK : (index + 1) * CHUNK]
        part[:] = CODECS[entry.codec].decode(data, part.size, dtype, head)
    stored = Stored(entry.name, entry.shape, entry.dtype, grid, flat)
    limits = DTYPES[entry.dtype].range if grid is None else None
    if limits is not None and flat.size and not limits[0] <= flat.min() <= flat.max() <= limits[1]:
        least, most = int(flat.min()), int(flat.max())
        allowed = f"{limits[0]} to {limits[1]}"
        raise BadFile(f"a {entry.dtype} out of range", got=f"{least} to {most}", allowed=allowed)
    if stored.digest() != entry.digest:
        raise BadFile("the digest of the decoded tensor is another one")
    return stored


def _verified(cursor: Cursor, index: int, chunk: tuple[int, int]) -> bytes:
    length, checksum = chunk
    data = cursor.take(length)
    if zlib.crc32(data) != checksum:
        part = f"chunk {index}" if index else "the tables"
        raise BadFile(f"CRC32 mismatch in {part}: the bytes were altered")
    return data
