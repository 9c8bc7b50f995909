"""The codecs of a packed file: of one flat array, and of the levels of several tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from karikomi.pack.codecs import adaptive, bits, contexts, gaps, planes, rans, raw


class SingleCodec(Protocol):
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


Shapes = Sequence[tuple[int, ...]]
Run = Callable[[Callable[[int], bytes | NDArray], Sequence[int]], list]
"""Calls a function with each of some numbers, perhaps in threads, and returns the results in order."""


class LevelCodec(Protocol):
    """A codec of levels, small signed integers, of one or several tensors of given shapes."""

    NAME: str

    def encode(
        self, levels: NDArray[np.int16], shapes: Shapes, symbols: int, run: Run
    ) -> tuple[bytes, list[bytes]] | None:
        """Return the tables and the chunks of `symbols` levels each, or ``None`` where the codec does not apply."""
        ...

    def decode(
        self, chunks: Sequence[bytes], shapes: Shapes, head: bytes, symbols: int, run: Run
    ) -> NDArray[np.int16]:
        """Return the levels; raise `BadFile` for damaged bytes."""
        ...


# Slowest last: it is left out where its lower bound is above the best of the others.
SINGLE_CODECS = {codec.NAME: cast(SingleCodec, codec) for codec in (raw, bits, planes, gaps, rans)}
LEVEL_CODECS = {codec.NAME: cast(LevelCodec, codec) for codec in (contexts, adaptive)}
