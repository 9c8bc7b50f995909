"""Saving: choose a codec for each group of tensors, lay out the file, write it in one go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO

import numpy as np

from karikomi.errors import check
from karikomi.files import as_path, write_atomically
from karikomi.pack.container import header, manifest
from karikomi.pack.container.contents import TensorGroup
from karikomi.pack.container.strict_json import VERSION
from karikomi.pack.delta import content_digest, difference
from karikomi.pack.grid_codec import grid_spec, write_grid
from karikomi.pack.groups.coding import packed
from karikomi.pack.groups.pools import Plan, Pools
from karikomi.pack.reader import opened
from karikomi.pack.stored import Stored, describe, digest, name_fault
from karikomi.quantize import Coded

LEAST_SHARED = 1024
"""Elements from which on equal tensors share a payload; small ones keep an entry of their own."""
LEAST_ALONE = 2**14
"""Bytes of a payload from which on a single tensor is in the directory under its own name."""
IN_MEMORY = 2**26
"""Bytes of payloads that are kept in memory; more wait in a temporary file."""


def save(
    tensors: Mapping[str, np.ndarray | Coded],
    path: str | os.PathLike[str],
    *,
    notes: Mapping[str, str] | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Path:
    """Write named tensors to an entropy-coded file and return its path.

    Arrays come back bit for bit; `Coded` tensors come back as the float32 values of their codes.
    Large tensors, and groups of small ones, take the codec that needs the fewest bytes; of equal ones (tied weights)
    one is stored, unless they are tiny. `tensors` may hold booleans, integers and floats of 16, 32 or 64 bits, of any
    shape, memory order and byte order, and bfloat16, float8, float4 and int4 as ml_dtypes has them; `notes` is short
    text to go with them. Values are taken one at a time, in the order of their names: a mapping that makes them when
    they are asked for needs memory for the largest ones. The same input gives the same bytes (with the same build of
    zlib). The file appears whole or not at all. `base`: a packed file; of tensors that it has in the same shape, type
    and grid the difference is stored where that is smaller, and the same file must be given to `load`.

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
    names = _names(tensors)
    before = _stored(base)
    target = as_path(path).expanduser()
    with SpooledTemporaryFile(IN_MEMORY) as pooled, SpooledTemporaryFile(IN_MEMORY) as alone:
        each = ((name, tensors[name]) for name in names)
        groups, equal, sizes, less = _encode(each, pooled, alone, before)
        known = content_digest(before) if base is not None else None
        start = manifest.dump(groups, equal, notes, known, less)
        sizes = {manifest.INDEX: len(start) + pooled.tell()} | sizes
        head = header.dump(sizes, VERSION)

        def write(stream: IO[bytes]) -> None:
            stream.writelines([head, start])
            for spool in (pooled, alone):
                spool.seek(0)
                shutil.copyfileobj(spool, stream)

        return write_atomically(target, write)


def _encode(
    tensors: Iterable[tuple[str, np.ndarray | Coded]],
    pooled: IO[bytes],
    alone: IO[bytes],
    base: Mapping[str, Stored],
) -> tuple[list[TensorGroup], dict[str, str], dict[str, int], set[str]]:
    """Write the payloads; return groups, name -> name of an equal tensor, sizes of what stands alone, differences."""
    groups: list[TensorGroup] = []
    equal: dict[str, str] = {}
    first: dict[Hashable, str] = {}
    sizes: dict[str, int] = {}
    pools, differences = Pools(), set[str]()

    def put(plans: Iterable[Plan]) -> None:
        for members, encoded in plans:
            group, parts = packed(members, encoded)
            groups.append(group)
            own = len(members) == 1 and group.size >= LEAST_ALONE
            (alone if own else pooled).writelines(parts)
            if own:
                sizes[members[0].name] = group.size

    for name, tensor in tensors:
        stored = describe(name, tensor)
        if stored.flat.size >= LEAST_SHARED:
            spec, numbers = str(grid_spec(stored.grid)), write_grid(stored.grid)
            content = stored.shape, stored.dtype, spec, numbers, digest(stored.flat)
            other = first.setdefault(content, name)
            if other != name:
                equal[name] = other
                continue
        less = difference(stored, base.get(name))
        if less is not None:
            differences.add(name)
        put(pools.add(less or stored))
    put(pools.close())
    return groups, equal, sizes, differences


def _stored(base: str | os.PathLike[str] | None) -> dict[str, Stored]:
    if base is None:
        return {}
    with opened(base) as file:
        return file.stored()


def _names(tensors: Mapping[str, np.ndarray | Coded]) -> list[str]:
    what = "tensors must be a mapping from names to arrays"
    check("save", (isinstance(tensors, Mapping), what, type(tensors).__name__, None))
    for name in tensors:
        fault = name_fault(name)
        check("save", (fault is None, f"bad tensor name: {fault}", repr(name)[:80], None))
    return sorted(tensors)
