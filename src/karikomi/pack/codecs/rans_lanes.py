"""Many entropy coders side by side: 32-bit states, refilled with 16-bit words from one shared stream.

A state lies in [2**16, 2**32). The encoder walks backwards from the state 2**16 in every lane, so a decoder that does
not end there, or does not use up every word, has met a damaged stream. Source: Duda, arXiv 1311.2540 (2013); the
interleaving follows Giesen, arXiv 1402.3392 (2014).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile
from karikomi.pack.codecs.cursor import Cursor, varint

BOTTOM = 2**16
WORD = 16
STATE_BYTES = 4
MOST_LANES = 4096
# Fewer lanes cost fewer bytes; more rows cost time, for whoever opens the file.
MOST_ROWS = 2**15
STATE_SHARE = 0.005


def lanes_for(count: int, bits: float, share: float = STATE_SHARE) -> int:
    """Return how many lanes `count` symbols of `bits` bits in all take, where states may take this share of them."""
    cheap = int(bits / 8 * share / STATE_BYTES)
    return min(count, MOST_LANES, max(1, cheap, -(-count // MOST_ROWS)))


def push(
    share: NDArray[np.uint32], start: NDArray[np.uint32], rows: Iterable[slice], precision: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """Return the final states and the words of symbols with these frequencies and starts, row by row.

    `rows`: the places of each row, the last row first; each row is as long as the lanes, or shorter.
    """
    rows = list(rows)
    total, shift = np.uint32(1 << precision), np.uint32(32 - precision)
    states = np.full(max(row.stop - row.start for row in rows), BOTTOM, np.uint32)
    words: list[NDArray[np.uint16]] = []
    # With q = x // share: q * total + x % share + start is x + q * (total - share) + start.
    limit, other, bottom = share << shift, total - share, np.uint32(WORD)
    for row in rows:
        live = states[: row.stop - row.start]
        (full,) = (live >= limit[row]).nonzero()
        if full.size:
            spilled = live[full]
            words.append(spilled.astype(np.uint16))
            live[full] = spilled >> bottom
        quotient = live // share[row]
        quotient *= other[row]
        live += quotient
        live += start[row]
    words.reverse()
    return states, np.concatenate(words) if words else np.empty(0, np.uint16)


def write(states: NDArray[np.uint32], words: NDArray[np.uint16]) -> bytes:
    """Return the lane count, the states and the words as stored."""
    return varint(states.size) + states.astype("<u4").tobytes() + words.astype("<u2").tobytes()


class Lanes:
    """The states and words of a stored stream while it is decoded; raises `BadFile` for a malformed one."""

    __slots__ = ("states", "used", "words")

    def __init__(self, data: bytes, count: int) -> None:
        cursor = Cursor(data)
        lanes = cursor.varint()
        if not 1 <= lanes <= min(count, MOST_LANES) or -(-count // lanes) > MOST_ROWS:
            raise BadFile("lane count out of range", got=lanes)
        # int64 throughout: NumPy takes from tables by it without a conversion.
        self.states = np.frombuffer(cursor.take(STATE_BYTES * lanes), "<u4").astype(np.int64)
        stream = cursor.rest()
        if len(stream) % 2 or bool((self.states < BOTTOM).any()):
            raise BadFile("an entropy-coded stream is malformed")
        self.words = np.frombuffer(stream, "<u2").astype(np.int64)
        self.used = 0

    def refill(self, live: NDArray[np.int64]) -> None:
        """Add a word to each state that is below the lower bound."""
        (dry,) = (live < BOTTOM).nonzero()
        if dry.size:
            fresh = self.words[self.used : self.used + dry.size]
            if fresh.size != dry.size:
                raise BadFile("an entropy-coded stream ends too early")
            live[dry] = live[dry] << WORD | fresh
            self.used += dry.size

    def close(self) -> None:
        """Raise `BadFile` unless every word is used and every state is back at its start."""
        if self.used != self.words.size or bool((self.states != BOTTOM).any()):
            raise BadFile("an entropy-coded stream does not end where it must")
