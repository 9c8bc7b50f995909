"""Coding a group of tensors: their grids and the codec's tables, then chunks; the same again backwards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile
from karikomi.pack.codecs import LEVEL_CODECS, SINGLE_CODECS, floats
from karikomi.pack.codecs.cursor import Cursor
from karikomi.pack.codecs.deflate import crc32
from karikomi.pack.container import manifest
from karikomi.pack.container.contents import ManifestEntry, TensorGroup
from karikomi.pack.grid_codec import GRID_CODECS, codec_of, grid_numbers, grid_spec, read_grid
from karikomi.pack.groups.levels import codes_of
from karikomi.pack.groups.on_cores import in_threads
from karikomi.pack.stored import DTYPES, Stored, code_dtype
from karikomi.quantize import Grid


class Encoded(NamedTuple):
    """Tensors encoded by one codec: its table, without the grids, and the chunks."""

    codec: str
    head: bytes
    chunks: list[bytes]

    @property
    def size(self) -> int:
        """Bytes of table and chunks."""
        return len(self.head) + sum(map(len, self.chunks))


class Decoded(NamedTuple):
    """A tensor as stored, and its values."""

    entry: ManifestEntry
    stored: Stored
    dense: NDArray


def entry_of(stored: Stored) -> ManifestEntry:
    """Return the manifest's entry of a tensor."""
    return ManifestEntry(stored.name, stored.shape, stored.dtype, grid_spec(stored.grid))


def packed(tensors: Sequence[Stored], encoded: Encoded) -> tuple[TensorGroup, list[bytes]]:
    """Return the group of encoded tensors, and the parts of its payload."""
    tables = written_grids(tensors) + encoded.head
    first, rest = encoded.chunks[:1], encoded.chunks[1:]
    parts = [tables + b"".join(first), *rest]
    group = TensorGroup(
        entries=tuple(map(entry_of, tensors)),
        codec=encoded.codec,
        tables=len(tables),
        chunks=tuple(map(len, encoded.chunks)),
        checks=tuple((len(part), crc32(part)) for part in parts),
        digest=_digest((stored.carried() for stored in tensors), manifest.DIGEST_BYTES),
        chunk_symbols=manifest.CHUNK_SYMBOLS,
    )
    return group, parts


def written_grids(tensors: Sequence[Stored]) -> bytes:
    """Return the numbers of all grids of a group as stored."""
    numbers = [codec_of(t.grid).numbers(t.grid) for t in tensors if t.grid is not None]
    return floats.write(np.concatenate(numbers).astype(np.float32)) if numbers else b""


def unpacked(group: TensorGroup, payload: bytes) -> list[Decoded]:
    """Return the tensors of a group's payload, verified; raise `BadFile` for any damage."""
    cursor = Cursor(payload)
    for index, (length, crc) in enumerate(group.checks):
        if crc32(cursor.take(length)) != crc:
            part = f"chunk {index}" if index else "the tables"
            raise BadFile(f"CRC32 mismatch in {part}: the bytes were altered")
    cursor = Cursor(payload)
    tables = Cursor(cursor.take(group.tables))
    grids = _grids(tables, group)
    head = tables.rest()
    if not group.symbols and head:
        raise BadFile("tables for a tensor without elements")
    chunks = [cursor.take(length) for length in group.chunks]
    flats = _decoded(group, grids, head, chunks)
    tensors = [
        Stored(entry.name, entry.shape, entry.dtype, grid, flat)
        for entry, grid, flat in zip(group.entries, grids, flats, strict=True)
    ]
    for stored in tensors:
        _check_range(stored)
    found = [Decoded(e, s, s.decoded()) for e, s in zip(group.entries, tensors, strict=True)]
    carried = (item.stored.carried(item.dense) for item in found)
    if _digest(carried, len(group.digest) // 2) != group.digest:
        raise BadFile("the digest of the decoded tensor is another one")
    return found


def _grids(tables: Cursor, group: TensorGroup) -> list[Grid | None]:
    if group.chunk_symbols != manifest.CHUNK_SYMBOLS:  # up to 1.2: a tensor's own, in another form
        entry = group.entries[0]
        return [read_grid(tables, entry.grid, entry.shape)]
    counts = [grid_numbers(entry.grid, entry.shape) for entry in group.entries]
    numbers = floats.read(tables, sum(counts))
    parts = np.split(numbers, np.cumsum(counts)[:-1])
    return [
        GRID_CODECS[entry.grid[0]].make(entry.grid[1:], part) if entry.grid else None
        for entry, part in zip(group.entries, parts, strict=True)
    ]


def _decoded(
    group: TensorGroup, grids: list[Grid | None], head: bytes, chunks: list[bytes]
) -> list[NDArray]:
    dtypes = [code_dtype(e.dtype, grid) for e, grid in zip(group.entries, grids, strict=True)]
    sizes = [entry.size for entry in group.entries]
    cuts = np.cumsum(sizes)[:-1]
    if group.codec not in LEVEL_CODECS:
        if len(set(dtypes)) > 1:
            got = ", ".join(sorted({str(dtype) for dtype in dtypes}))
            raise BadFile("tensors of several types in one stream", got=got)
        codec, flat = SINGLE_CODECS[group.codec], np.empty(sum(sizes), dtypes[0])

        def fill(index: int) -> None:
            part = flat[index * group.chunk_symbols : (index + 1) * group.chunk_symbols]
            part[:] = codec.decode(chunks[index], part.size, flat.dtype, head)

        in_threads(fill, range(len(chunks)))
        return np.split(flat, cuts)
    shapes = [entry.shape for entry in group.entries]
    levels = LEVEL_CODECS[group.codec].decode(chunks, shapes, head, group.chunk_symbols, in_threads)
    parts = np.split(levels, cuts)
    return [
        codes_of(part, grid, dtype) for part, grid, dtype in zip(parts, grids, dtypes, strict=True)
    ]


def _check_range(stored: Stored) -> None:
    limits = DTYPES[stored.dtype].range if stored.grid is None else None
    flat = stored.flat
    if limits is not None and flat.size and not limits[0] <= flat.min() <= flat.max() <= limits[1]:
        least, most = int(flat.min()), int(flat.max())
        allowed = f"{limits[0]} to {limits[1]}"
        raise BadFile(f"a {stored.dtype} out of range", got=f"{least} to {most}", allowed=allowed)


def _digest(arrays: Iterable[NDArray], size: int) -> str:
    """Return the first bytes of SHA-256 over the little-endian C-order bytes of arrays, in hex."""
    machine = hashlib.sha256()
    for array in arrays:
        flat = np.ascontiguousarray(array).reshape(-1)
        little = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
        machine.update(little.view(np.uint8).data)
    return machine.hexdigest()[: 2 * size]
