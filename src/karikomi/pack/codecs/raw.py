"""Codec ``raw``: the bytes as they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile

NAME = "raw"


def fit(flat: NDArray) -> bytes | None:
    """Return the codec's table: none."""
    return b""


def floor(flat: NDArray, head: bytes) -> int:
    """Return the size of all chunks in bytes."""
    return flat.nbytes


def encode(chunk: NDArray, head: bytes) -> bytes:
    """Return the chunk's bytes."""
    return chunk.tobytes()


def decode(data: bytes, count: int, dtype: np.dtype, head: bytes) -> NDArray:
    """Return `count` numbers; raise `BadFile` where the length does not agree."""
    if head or len(data) != count * dtype.itemsize:
        raise BadFile("wrong number of bytes", got=len(data), allowed=count * dtype.itemsize)
    return np.frombuffer(data, dtype)
