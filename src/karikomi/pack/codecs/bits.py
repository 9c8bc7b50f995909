"""Codec ``bits``: integers less their smallest, each in the same few bits, without gaps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile
from karikomi.pack.codecs.cursor import Cursor, signed_varint

NAME = "bits"
MOST_WIDTH = 32
# Larger integers would overflow the 64-bit arithmetic below.
BEYOND = 2**62


def fit(flat: NDArray) -> bytes | None:
    """Return smallest value and width, or ``None`` for floats and ranges beyond 32 bits."""
    if flat.dtype.kind not in "iu" or not flat.size:
        return None
    low, high = int(flat.min()), int(flat.max())
    width = (high - low).bit_length()
    if width > MOST_WIDTH or max(-low, high) >= BEYOND:
        return None
    return signed_varint(low) + bytes([width])


def floor(flat: NDArray, head: bytes) -> int:
    """Return the size of all chunks in bytes."""
    return (flat.size * head[-1] + 7) // 8


def encode(chunk: NDArray, head: bytes) -> bytes:
    """Return the chunk packed, highest bit first, filled up with zeros to a whole byte."""
    low, width = _parse(head)
    carrier = _carrier(width)
    rows = (chunk.astype(np.int64) - low).astype(carrier).view(np.uint8)
    rows = np.unpackbits(rows.reshape(chunk.size, -1), axis=1)
    return np.packbits(rows[:, 8 * carrier.itemsize - width :]).tobytes()


def decode(data: bytes, count: int, dtype: np.dtype, head: bytes) -> NDArray:
    """Return `count` integers; raise `BadFile` for a wrong length, fill or range."""
    low, width = _parse(head)
    if len(data) != (count * width + 7) // 8:
        raise BadFile("wrong number of bytes", got=len(data), allowed=(count * width + 7) // 8)
    row = np.unpackbits(np.frombuffer(data, np.uint8))
    if row[count * width :].any():
        raise BadFile("the fill of the last byte is not zero")
    carrier = _carrier(width)
    rows = np.zeros((count, 8 * carrier.itemsize), np.uint8)
    rows[:, 8 * carrier.itemsize - width :] = row[: count * width].reshape(count, width)
    values = np.packbits(rows).view(carrier).astype(np.int64) + low
    return within(values, dtype)


def within(values: NDArray[np.int64], dtype: np.dtype) -> NDArray:
    """Return `values` as `dtype`, or raise `BadFile` where one does not fit."""
    bounds = np.iinfo(dtype)
    if values.size and not (bounds.min <= values.min() and values.max() <= bounds.max):
        raise BadFile(
            "integers do not fit their type",
            got=f"{values.min()}..{values.max()}",
            allowed=f"{bounds.min}..{bounds.max}",
        )
    return values.astype(dtype)


def _parse(head: bytes) -> tuple[int, int]:
    cursor = Cursor(head)
    low, width = cursor.signed_varint(), cursor.take(1)[0]
    cursor.close()
    if width > MOST_WIDTH:
        raise BadFile("bit width out of range", got=width, allowed=f"0..{MOST_WIDTH}")
    return low, width


def _carrier(width: int) -> np.dtype[np.unsignedinteger]:
    return np.dtype(">u1" if width <= 8 else ">u2" if width <= 16 else ">u4")
