"""The choice of a codec: all that apply are tried, the smallest result is taken."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from karikomi.pack.codecs import LEVEL_CODECS, SINGLE_CODECS, SingleCodec, adaptive, planes, raw
from karikomi.pack.container import manifest
from karikomi.pack.groups.coding import Encoded, written_grids
from karikomi.pack.groups.levels import levels_of
from karikomi.pack.groups.on_cores import in_threads
from karikomi.pack.stored import Stored, describe
from karikomi.quantize import Coded

SAMPLED_FROM, SAMPLE = 2**19, 2**16
NEAR, NEAR_BYTES = 1.005, 64
SLOW_BYTES = 2**13
"""Where single symbols would take more, coding one level after the other takes seconds for a few per cent."""


def choose(flat: NDArray) -> Encoded:
    """Return the smallest encoding of a flat tensor; the first in the list where two are equal.

    Of large tensors only those codecs are tried that come close to the smallest on a part from the middle.
    """
    best = _encoded(SINGLE_CODECS[raw.NAME], flat, b"")
    fits = [(codec, codec.fit(flat)) for codec in _likely(flat)]
    if any(head is None for _, head in fits):  # what fits the part, and not one value elsewhere
        fits = [(codec, codec.fit(flat)) for codec in SINGLE_CODECS.values()]
    for codec, head in fits:
        if head is None or codec.floor(flat, head) + len(head) >= best.size:
            continue
        encoded = _encoded(codec, flat, head)
        if encoded.size + len(codec.NAME) < best.size + len(best.codec):
            best = encoded
    return best


def _likely(flat: NDArray) -> list[SingleCodec]:
    codecs = list(SINGLE_CODECS.values())
    if flat.size < SAMPLED_FROM:
        return codecs
    middle = (flat.size - SAMPLE) // 2
    part = flat[middle : middle + SAMPLE]
    heads = [codec.fit(part) for codec in codecs]
    sizes = [
        math.inf if head is None else len(codec.encode(part, head))
        for codec, head in zip(codecs, heads, strict=True)
    ]
    near = NEAR * min(sizes) + NEAR_BYTES
    return [codec for codec, size in zip(codecs, sizes, strict=True) if size <= near]


def choose_levels(tensors: list[Stored], *, slow: bool = True) -> Encoded | None:
    """Return the smallest encoding of the levels of tensors in one stream, ``None`` where no codec applies.

    `slow`: also try those that code one level after the other.
    """
    parts = [levels_of(stored.flat, stored.grid) for stored in tensors]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or not known:
        return None
    levels, shapes = np.concatenate(known), [stored.shape for stored in tensors]
    found = []
    slow = slow and sum(map(shannon, tensors)) <= SLOW_BYTES
    for name, codec in LEVEL_CODECS.items():
        if name == adaptive.NAME and not slow:
            continue
        coded = codec.encode(levels, shapes, manifest.CHUNK_SYMBOLS, in_threads)
        if coded is not None:
            found.append(Encoded(name, *coded))
    return min(found, key=lambda encoded: encoded.size, default=None)


def encoded_sizes(tensor: np.ndarray | Coded) -> dict[str, int]:
    """Return the bytes that each applicable codec needs for a tensor: payload, tables, grid.

    Raises `InvalidArgument` for what cannot be packed.

    >>> encoded_sizes(np.zeros(1000, np.int8))
    {'raw': 1000, 'bits': 2, 'planes': 2, 'gaps': 5, 'adaptive': 1}
    """
    stored = describe("tensor", tensor)
    grid = len(written_grids([stored]))
    sizes = {}
    for codec in SINGLE_CODECS.values():
        head = codec.fit(stored.flat)
        if head is not None:
            sizes[codec.NAME] = grid + _encoded(codec, stored.flat, head).size
    levels = choose_levels([stored])
    return sizes if levels is None else sizes | {levels.codec: grid + levels.size}


def shannon(stored: Stored) -> float:
    """Return the order-0 bound in bytes: of the integers, or of each byte plane of floats."""
    flat = stored.flat
    if flat.dtype.itemsize <= 2 and flat.dtype.kind in "iu":
        return planes.entropy(np.bincount(flat.view(f"<u{flat.dtype.itemsize}"))) / 8
    if flat.dtype.kind in "iu":
        return planes.entropy(np.unique(flat, return_counts=True)[1]) / 8
    rows = flat.view(np.uint8).reshape(-1, flat.dtype.itemsize)
    return sum(planes.entropy(np.bincount(column)) for column in rows.T) / 8


def _encoded(codec: SingleCodec, flat: NDArray, head: bytes) -> Encoded:
    def chunk(at: int) -> bytes:
        return codec.encode(flat[at : at + manifest.CHUNK_SYMBOLS], head)

    return Encoded(codec.NAME, head, in_threads(chunk, range(0, flat.size, manifest.CHUNK_SYMBOLS)))
