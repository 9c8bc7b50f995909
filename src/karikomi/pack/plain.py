"""Plain safetensors files, of any types: their directory, read as strictly as that of packed ones."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from karikomi.errors import BadFile, Unsupported
from karikomi.files import as_path, write_bytes
from karikomi.pack.container.header import (
    LENGTH_BYTES,
    METADATA,
    VERSION_KEY,
    ascending,
    read_json,
    require_tiling,
)
from karikomi.pack.container.strict_json import require
from karikomi.pack.read_budget import Budget
from karikomi.pack.reader import opened
from karikomi.pack.stored import DTYPES, EXTENDED, Stored, array_dtype

TYPES = {
    "BOOL": "b1",
    **{f"{kind.upper()}{8 * size}": f"{kind}{size}" for kind in "ui" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": f"f{size}" for size in (2, 4, 8)},
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn",
}
"""The types of safetensors that can be packed -> their names in a packed file."""
_BITS = {name: DTYPES[kind].bits for name, kind in TYPES.items()} | {
    "C64": 64,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Bits of an entry; the size of tensors of other types is not checked."""
# Without a name in safetensors: a number takes a byte there.
_WIDENED = {"int4": "I8", "uint4": "U8"}


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
    found = [_tensor(name, item, start, where) for name, item in whole.items()]
    require_tiling({item.name: (item.start, item.end) for item in found}, start, file_size, where)
    return sorted(found, key=lambda value: (value.start, value.end)), start


def expand(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    budget: Budget | None = None,
) -> Path:
    """Decode a packed file and write its tensors, dense, to the safetensors file `out`.

    Notes go into the metadata; int4 and uint4, which safetensors does not have, take a byte.
    `base`: the file that a delta was saved against.
    Raises `BadFile` as `load` does, `Unwritable` from the disk.

    >>> import tempfile
    >>> import numpy as np
    >>> from karikomi.pack import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     packed = save({"x": np.zeros(100, np.float32)}, folder + "/x.karikomi")
    ...     expand(packed, folder + "/x.safetensors").stat().st_size > 400
    True
    """
    with opened(path, budget, base) as file:
        content = _dense(file.named(lambda item: item.stored), file.notes)
    return write_bytes(as_path(out).expanduser(), content)


def read(path: str | os.PathLike[str], *, budget: Budget | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of a plain safetensors file by name, those of bfloat16 and smaller as ml_dtypes has them.

    Raises `BadFile` for a file that is damaged or hostile, or has a type that cannot be stored.
    """
    where, budget = str(path), budget or Budget()
    with open(path, "rb") as stream:
        tensors, _ = directory(stream, os.fstat(stream.fileno()).st_size, where, budget)
        for tensor in tensors:
            budget.admit_elements(tensor.shape, f"{where}, tensor {tensor.name[:80]!r}")
        budget.admit("decoded", sum(tensor.end - tensor.start for tensor in tensors), where)
        return {tensor.name: _array(tensor, stream, where) for tensor in tensors}


def _array(tensor: StoredTensor, stream: BinaryIO, where: str) -> np.ndarray:
    kind = TYPES.get(tensor.dtype)
    if kind is None:
        raise BadFile(
            "a type that cannot be stored",
            where=f"{where}, tensor {tensor.name[:80]!r}",
            got=tensor.dtype,
            allowed=", ".join(TYPES),
            hint="convert it first",
        )
    stream.seek(tensor.start)
    data = np.frombuffer(bytearray(stream.read(tensor.end - tensor.start)), "u1")
    if DTYPES[kind].bits == 4:
        data = np.stack([data & 15, data >> 4], axis=-1).reshape(-1)  # the first in the lower half
    return data.view(array_dtype(kind)).reshape(tensor.shape)


def _dense(tensors: Mapping[str, Stored], notes: Mapping[str, str]) -> bytes:
    """Return a safetensors file of decoded tensors, the widest types first, as readers align them."""
    names = {kind: name for name, kind in TYPES.items()} | _WIDENED
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype].bits, name))
    whole: dict[str, Any] = {METADATA: dict(notes)} if notes else {}
    payloads, at = [], 0
    for name in order:
        stored = tensors[name]
        data = stored.flat if stored.dtype in EXTENDED else stored.decoded()
        shape, kind = stored.shape, names[stored.dtype]
        if stored.dtype == "int4":
            data = (data ^ 8).astype("i1") - np.int8(8)  # the fourth bit is the sign
        payload = _halves(data).tobytes() if kind == "F4" else data.tobytes()
        span = [at, at := at + len(payload)]
        whole[name] = {"dtype": kind, "shape": shape, "data_offsets": span}
        payloads.append(payload)
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(LENGTH_BYTES, "little"), text, *payloads])


def _halves(data: np.ndarray) -> np.ndarray:
    if data.size % 2:
        raise Unsupported("safetensors stores float4 in pairs", where="expand", got=data.size)
    return data[0::2] | data[1::2] << 4


def _tensor(name: str, item: Any, start: int, where: str) -> StoredTensor:
    where = f"{where}, tensor {name[:80]!r}"
    keys = {"dtype", "shape", "data_offsets"}
    good = isinstance(item, dict) and set(item) == keys and ascending(item["data_offsets"])
    require(good, "malformed directory entry", where, item)
    dtype, shape = item["dtype"], item["shape"]
    good = isinstance(shape, list) and all(type(length) is int and length >= 0 for length in shape)
    require(good and isinstance(dtype, str), "malformed type or shape", where, item)
    first, last = item["data_offsets"]
    if dtype in _BITS:
        size = math.prod(shape) * _BITS[dtype]
        require(
            size == 8 * (last - first), "the payload does not fit its shape", where, last - first
        )
    return StoredTensor(name, dtype, tuple(shape), start + first, start + last)
