"""Plain safetensors files, of any types: their directory, read as strictly as that of packed ones."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from karikomi.errors import BadFile
from karikomi.files import as_path, write_bytes
from karikomi.pack.header import METADATA, VERSION_KEY, ascending, read_json, require_tiling
from karikomi.pack.manifest import require
from karikomi.pack.read_budget import Budget
from karikomi.pack.reader import opened

_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes of an entry, by the format's names of types; the size of other types is not checked."""


class StoredTensor(NamedTuple):
    """A tensor of a file: its type by the format's name, and its span from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)


def directory(
    stream: BinaryIO, file_size: int, where: str, budget: Budget | None = None
) -> tuple[list[StoredTensor], int]:
    """Return the tensors of an open file in the order of their payloads, and the start of the first.

    Raises `BadFile` for a bad header, payloads that overlap, leave holes or do not fit their shapes,
    and for a packed file.
    """
    budget = budget or Budget()
    whole, start = read_json(stream, file_size, budget, where)
    metadata = whole.pop(METADATA, {})
    good = isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    require(good, "the metadata is not text", where)
    if VERSION_KEY in metadata:
        raise BadFile("a packed file", where=where, hint="expand it first: karikomi unpack")
    budget.admit("tensors", len(whole), where)
    found = [_tensor(name, item, start, budget, where) for name, item in whole.items()]
    require_tiling({item.name: (item.start, item.end) for item in found}, start, file_size, where)
    return sorted(found, key=lambda value: (value.start, value.end)), start


def expand(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    budget: Budget | None = None,
) -> Path:
    """Decode a packed file and write its tensors, dense, to the safetensors file `out`.

    Notes go into the metadata. Raises `BadFile` as `load` does, `Unwritable` from the disk.

    >>> import tempfile
    >>> import numpy as np
    >>> from karikomi.pack import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     packed = save({"x": np.zeros(100, np.float32)}, folder + "/x.karikomi")
    ...     expand(packed, folder + "/x.safetensors").stat().st_size > 400
    True
    """
    from safetensors.numpy import save

    with opened(path, budget) as file:
        arrays = {entry.name: stored.decoded() for entry, stored in file.tensors()}
        content = save(arrays, metadata=file.notes or None)
    return write_bytes(as_path(out).expanduser(), content)


def _tensor(name: str, item: Any, start: int, budget: Budget, where: str) -> StoredTensor:
    where = f"{where}, tensor {name[:80]!r}"
    keys = {"dtype", "shape", "data_offsets"}
    good = isinstance(item, dict) and set(item) == keys and ascending(item["data_offsets"])
    require(good, "malformed directory entry", where, item)
    dtype, shape = item["dtype"], item["shape"]
    good = isinstance(shape, list) and all(type(length) is int and length >= 0 for length in shape)
    require(good and isinstance(dtype, str), "malformed type or shape", where, item)
    budget.admit("rank", len(shape), where)
    first, last = item["data_offsets"]
    if dtype in _BYTES:
        size = math.prod(shape) * _BYTES[dtype]
        require(size == last - first, "the payload does not fit its shape", where, last - first)
    return StoredTensor(name, dtype, tuple(shape), start + first, start + last)
