"""Differences from a base file: fine-tuned weights, checkpoints, merged adapters.

Numbers are subtracted as integers, bit pattern from bit pattern, so that every difference is exact. Floats that moved
a little differ in their lowest bits only; their differences have the sign in the lowest bit, so that the higher bytes
are zero. The base is known by the digest of its content. It is given again when a delta is read, and never looked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile, InvalidArgument
from karikomi.pack.grid_codec import codec_of, grid_spec
from karikomi.pack.groups.contest import shannon
from karikomi.pack.stored import Stored

DIGEST_BYTES = 16
Path = str | os.PathLike[str]


def content_digest(tensors: Mapping[str, Stored]) -> str:
    """Return the digest of tensors with their names, types, shapes and bits, in hex."""
    machine = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        head = f"{name}\0{stored.dtype}\0{list(stored.shape)}\0{grid_spec(stored.grid)}\0"
        machine.update(head.encode("utf-8"))
        machine.update(np.ascontiguousarray(stored.carried()).reshape(-1).view(np.uint8).data)
    return machine.hexdigest()[: 2 * DIGEST_BYTES]


def difference(stored: Stored, base: Stored | None) -> Stored | None:
    """Return a tensor less that of the base, or ``None`` where they are not of one kind, or nothing is gained."""
    if base is None or not stored.flat.size or not _alike(stored, base):
        return None
    unsigned = f"<u{stored.flat.dtype.itemsize}"
    flat = stored.flat.view(unsigned) - base.flat.view(unsigned)
    signed = flat.view(f"<i{flat.dtype.itemsize}")
    if stored.flat.dtype.kind == "f":
        flat = flat << 1 ^ (signed >> 8 * flat.dtype.itemsize - 1).view(unsigned)
    else:
        flat = signed
    kind = flat.dtype.str[1:]
    less = Stored(stored.name, stored.shape, kind, None, flat)
    return less if shannon(less) < shannon(stored) else None


def restored(less: Stored, base: Stored | None) -> Stored:
    """Return the tensor of a difference; raise `BadFile` where it is not one from this base."""
    known = base is not None and base.shape == less.shape and less.grid is None
    if base is None or not known or less.flat.dtype.itemsize != base.flat.dtype.itemsize:
        raise BadFile("the tensor is no difference from its base")
    unsigned = f"<u{less.flat.dtype.itemsize}"
    flat = less.flat.view(unsigned)
    if base.flat.dtype.kind == "f":
        flat = flat >> 1 ^ -(flat & 1)
    whole = (base.flat.view(unsigned) + flat).view(base.flat.dtype)
    return replace(base, name=less.name, flat=whole)


def check_base(needed: str | None, tensors: Mapping[str, Stored] | None, where: str) -> None:
    """Raise `InvalidArgument` unless a delta is read with its base, and any other file without one."""
    if needed is None and tensors is not None:
        raise InvalidArgument("the file is no delta", where=where, hint="read it without base=")
    if needed is not None and tensors is None:
        hint = "read it with base= (karikomi unpack --base), the file that it was saved against"
        raise InvalidArgument("the file is a delta", where=where, got="no base", hint=hint)
    if needed is not None and tensors is not None and content_digest(tensors) != needed:
        got = content_digest(tensors)
        raise InvalidArgument("this is not the base", where=where, got=got, allowed=needed)


def _alike(stored: Stored, base: Stored) -> bool:
    same = stored.shape == base.shape and stored.dtype == base.dtype
    if not same or grid_spec(stored.grid) != grid_spec(base.grid):
        return False
    return stored.grid is None or bool(np.array_equal(_numbers(stored), _numbers(base)))


def _numbers(stored: Stored) -> NDArray:
    return codec_of(stored.grid).numbers(stored.grid) if stored.grid else np.empty(0)
