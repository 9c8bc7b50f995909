"""Codec ``planes``: the first bytes of all numbers, then the second ones, each coded by itself.

Exponents of floats resemble one another and mantissas do not: apart they compress, mixed they do
not (the idea of ZipNN, 2024, with zlib's Huffman-only strategy as the coder). The streams of the
other codecs are written with `write` too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile
from karikomi.pack.codecs import deflate
from karikomi.pack.codecs.cursor import Cursor, varint

NAME = "planes"
STORED, DEFLATED, CONSTANT = 0, 1, 2
SAMPLE = 2**16
# Above this many bits per byte Huffman cannot win back its own table.
HOPELESS = 7.97


def fit(flat: NDArray) -> bytes | None:
    """Return the codec's table: empty, each plane has its own coding mode."""
    return b""


def floor(flat: NDArray, head: bytes) -> int:
    """Return a lower bound of the coded bytes: unknown before it is done."""
    return 0


def encode(chunk: NDArray, head: bytes) -> bytes:
    """Return the planes of `chunk`, lowest byte first."""
    return write(chunk)


def decode(data: bytes, count: int, dtype: np.dtype, head: bytes) -> NDArray:
    """Return `count` numbers; raise `BadFile` for a damaged plane or bytes left over."""
    if head:
        raise BadFile("this codec has no table", got=f"{len(head)} bytes")
    cursor = Cursor(data)
    numbers = read(cursor, count, dtype)
    cursor.close()
    return numbers


def write(numbers: NDArray) -> bytes:
    """Return the planes of a one-dimensional array, each with its length and its way of coding."""
    rows = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, numbers.dtype.itemsize)
    return b"".join(_write_plane(rows[:, i]) for i in range(rows.shape[1]))


def read(cursor: Cursor, count: int, dtype: np.dtype) -> NDArray:
    """Return the next `count` numbers of `dtype`."""
    rows = np.empty((count, dtype.itemsize), np.uint8)
    for index in range(dtype.itemsize):
        rows[:, index] = _read_plane(cursor, count)
    return rows.reshape(-1).view(dtype)


def _write_plane(plane: NDArray[np.uint8]) -> bytes:
    data = plane.tobytes()
    if data and data.count(data[0]) == len(data):
        return varint(1 << 2 | CONSTANT) + data[:1]
    best = min((_squeeze(plane, data), (STORED, data)), key=lambda pair: len(pair[1]))
    return varint(len(best[1]) << 2 | best[0]) + best[1]


def _squeeze(plane: NDArray[np.uint8], data: bytes) -> tuple[int, bytes]:
    if entropy(np.bincount(plane)) > HOPELESS * plane.size:
        return STORED, data
    strategies = [deflate.HUFFMAN, deflate.MATCHES]
    if len(data) > SAMPLE:
        middle = len(data) // 2
        part = data[middle - SAMPLE // 2 : middle + SAMPLE // 2]
        strategies = [min(strategies, key=lambda value: len(deflate.squeeze(part, value)))]
    return DEFLATED, min((deflate.squeeze(data, strategy) for strategy in strategies), key=len)


def entropy(counts: NDArray) -> float:
    """Return the bits that an ideal coder of single symbols needs for so many of each."""
    used = counts[counts > 0]
    return float((used * np.log2(used.sum() / used)).sum())


def _read_plane(cursor: Cursor, count: int) -> NDArray[np.uint8] | int:
    length, way = divmod(cursor.varint(), 4)
    data = cursor.take(length)
    if way == CONSTANT and length == 1:
        return data[0]
    if way == DEFLATED:
        data = deflate.expand(data, count)
    elif way != STORED:
        raise BadFile("a byte plane is coded in an unknown way", got=way)
    if len(data) != count:
        raise BadFile("a byte plane has the wrong length", got=len(data), allowed=count)
    return np.frombuffer(data, np.uint8)
