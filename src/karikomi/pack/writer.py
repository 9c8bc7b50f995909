"""Saving: choose a codec per tensor, lay out the file, write it in one go."""

from __future__ import annotations

import os
import zlib
from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np

from karikomi.errors import check
from karikomi.files import as_path, write_atomically
from karikomi.pack import header, manifest
from karikomi.pack.contest import choose
from karikomi.pack.grid_codec import grid_spec, write_grid
from karikomi.pack.manifest import ManifestEntry
from karikomi.pack.stored import Stored, describe, digest, name_fault
from karikomi.quantize import Coded

LEAST_SHARED = 256
"""Bytes of a payload from which on equal tensors share one; small ones keep an entry of their own."""


def save(
    tensors: Mapping[str, np.ndarray | Coded],
    path: str | os.PathLike[str],
    *,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write named tensors to an entropy-coded file and return its path.

    Arrays come back bit for bit; `Coded` tensors come back as the float32 values of their codes.
    Each tensor takes the codec that needs the fewest bytes; of equal ones (tied weights) one is
    stored, unless they are tiny. `tensors` may hold booleans, integers and floats of 16, 32 or 64 bits, of
    any shape, memory order and byte order, and bfloat16, float8, float4 and int4 as ml_dtypes has them;
    `notes` is short text to go with them. Tensors are stored in the order of their names: the same input
    gives the same bytes (with the same build of zlib). The file appears whole or not at all.

    Raises `InvalidArgument` for what cannot be packed or a bad name, `Unwritable` from the disk.

    >>> import tempfile
    >>> from karikomi.quantize import kmeans
    >>> from karikomi.pack import load
    >>> weight = np.zeros((100, 100), np.float32)
    >>> weight[::10, ::7] = -1.5
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save({"weight": kmeans(weight)}, folder + "/small.karikomi")
    ...     path.stat().st_size < 400, bool((load(path)["weight"] == weight).all())
    (True, True)

    Source: the container is safetensors; the pipeline is Han, Mao, Dally, "Deep Compression", ICLR
    2016, with static rANS as a second coder.
    """
    notes = dict(notes or {})
    worded = all(isinstance(item, str) for pair in notes.items() for item in pair)
    check("save", (worded, "notes must map text to text", None, None))
    entries: list[ManifestEntry] = []
    payloads: dict[str, bytes] = {}
    equal: dict[str, str] = {}
    first: dict[Hashable, str] = {}
    for name in _names(tensors):
        stored = describe(name, tensors[name])
        other = first.setdefault(_content(stored), name)
        if other != name and len(payloads[other]) >= LEAST_SHARED:
            equal[name] = other
            continue
        entry, payload = _pack(stored)
        entries.append(entry)
        payloads[name] = payload
    sizes = {name: len(payload) for name, payload in payloads.items()}
    text = manifest.dump(entries, equal, notes)
    head = header.dump(sizes, text, manifest.version_of(entries, equal))

    def write(stream: object) -> None:
        stream.writelines([head, *payloads.values()])  # type: ignore[attr-defined]

    return write_atomically(as_path(path).expanduser(), write)


def _content(stored: Stored) -> Hashable:
    """Return what two tensors have in common that one payload can stand for."""
    codes = digest(stored.flat)
    return stored.shape, stored.dtype, str(grid_spec(stored.grid)), write_grid(stored.grid), codes


def _pack(stored: Stored) -> tuple[ManifestEntry, bytes]:
    encoded = choose(stored.flat)
    parts = [write_grid(stored.grid) + encoded.head, *encoded.chunks]
    chunks = tuple((len(part), zlib.crc32(part)) for part in parts)
    entry = ManifestEntry(
        name=stored.name,
        shape=stored.shape,
        dtype=stored.dtype,
        grid=grid_spec(stored.grid),
        codec=encoded.codec,
        chunks=chunks,
        digest=stored.digest(),
    )
    return entry, b"".join(parts)


def _names(tensors: Mapping[str, np.ndarray | Coded]) -> list[str]:
    what = "tensors must be a mapping from names to arrays"
    check("save", (isinstance(tensors, Mapping), what, type(tensors).__name__, None))
    for name in tensors:
        fault = name_fault(name)
        check("save", (fault is None, f"bad tensor name: {fault}", repr(name)[:80], None))
    return sorted(tensors)
