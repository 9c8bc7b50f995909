"""The choice of a tensor's codec: all that apply are tried, the smallest result is taken."""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from karikomi.pack.codecs import bits, gaps, planes, rans, raw
from karikomi.pack.grid_codec import write_grid
from karikomi.pack.stored import Stored, describe
from karikomi.quantize import Coded

CHUNK = 2**20


class Codec(Protocol):
    """The functions of a codec module; tables and chunks are bytes, tensors flat, little-endian."""

    NAME: str

    def fit(self, flat: NDArray) -> bytes | None:
        """Return the table for a tensor, or ``None`` where the codec does not apply."""
        ...

    def floor(self, flat: NDArray, head: bytes) -> int:
        """Return a lower bound of the coded bytes, cheaply."""
        ...

    def encode(self, chunk: NDArray, head: bytes) -> bytes:
        """Return the coded bytes of one chunk."""
        ...

    def decode(self, data: bytes, count: int, dtype: np.dtype, head: bytes) -> NDArray:
        """Return the `count` numbers of one chunk; raise `BadFile` for damaged bytes."""
        ...


# Slowest last: it is left out where its lower bound is above the best of the others.
CODECS = {codec.NAME: cast(Codec, codec) for codec in (raw, bits, planes, gaps, rans)}
INTEGER_CODECS = frozenset({bits.NAME, rans.NAME})


class Encoded(NamedTuple):
    """A tensor encoded by one codec."""

    codec: str
    head: bytes
    chunks: list[bytes]

    @property
    def size(self) -> int:
        """Bytes of table and chunks."""
        return len(self.head) + sum(map(len, self.chunks))


def choose(flat: NDArray) -> Encoded:
    """Return the smallest encoding of a flat tensor; the first in the list where two are equal."""
    best = _encoded(CODECS[raw.NAME], flat, b"")
    for codec in CODECS.values():
        head = codec.fit(flat)
        if head is None or codec.floor(flat, head) + len(head) >= best.size:
            continue
        encoded = _encoded(codec, flat, head)
        if encoded.size + len(codec.NAME) < best.size + len(best.codec):
            best = encoded
    return best


def encoded_sizes(tensor: np.ndarray | Coded) -> dict[str, int]:
    """Return the bytes that each applicable codec needs for a tensor: payload, tables, grid.

    Raises `InvalidArgument` for what cannot be packed.

    >>> encoded_sizes(np.zeros(1000, np.int8))
    {'raw': 1000, 'bits': 2, 'planes': 2, 'gaps': 5}
    """
    stored = describe("tensor", tensor)
    grid = len(write_grid(stored.grid))
    sizes = {}
    for codec in CODECS.values():
        head = codec.fit(stored.flat)
        if head is not None:
            sizes[codec.NAME] = grid + _encoded(codec, stored.flat, head).size
    return sizes


def shannon(stored: Stored) -> float:
    """Return the order-0 bound in bytes: of the integers, or of each byte plane of floats."""
    flat = stored.flat
    if flat.dtype.itemsize <= 2 and flat.dtype.kind in "iu":
        return planes.entropy(np.bincount(flat.view(f"<u{flat.dtype.itemsize}"))) / 8
    if flat.dtype.kind in "iu":
        return planes.entropy(np.unique(flat, return_counts=True)[1]) / 8
    rows = flat.view(np.uint8).reshape(-1, flat.dtype.itemsize)
    return sum(planes.entropy(np.bincount(column)) for column in rows.T) / 8


def _encoded(codec: Codec, flat: NDArray, head: bytes) -> Encoded:
    chunks = [codec.encode(flat[at : at + CHUNK], head) for at in range(0, flat.size, CHUNK)]
    return Encoded(codec.NAME, head, chunks)
