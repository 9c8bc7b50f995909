"""Codec ``rans``: static range coding, many lanes side by side, integers only.

Each lane is a 32-bit state in [2**16, 2**32) that is refilled with 16-bit words from one shared
stream; lane `i` codes the symbols i, i + lanes, i + 2 lanes ... Decoding is gather, multiply, mask.
The encoder walks backwards from the state 2**16, so a decoder that does not end there, or does not
use up every word, has met a damaged stream. Source: Duda, arXiv 1311.2540 (2013); the interleaving
follows Giesen, arXiv 1402.3392 (2014).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile
from karikomi.pack.codecs import frequencies
from karikomi.pack.codecs.bits import within
from karikomi.pack.codecs.cursor import Cursor, varint
from karikomi.pack.codecs.frequencies import Frequencies

NAME = "rans"
BOTTOM = np.uint32(2**16)
WORD = np.uint32(16)
MOST_LANES = 4096
# Fewer lanes cost fewer bytes; more rows cost time, for whoever opens the file.
MOST_ROWS = 2**15
STATE_BYTES = 4
STATE_SHARE = 0.005


def fit(flat: NDArray) -> bytes | None:
    """Return the frequency table, or ``None`` for floats, wide ranges and constant tensors."""
    table = frequencies.fit(flat)
    return None if table is None else table.to_bytes()


def floor(flat: NDArray, head: bytes) -> int:
    """Return a lower bound of the coded bytes: the cross-entropy under the table."""
    return int(frequencies.parse(head).bits(flat) / 8)


def encode(chunk: NDArray, head: bytes) -> bytes:
    """Return the lane count, the final states and the words of `chunk`."""
    table = frequencies.parse(head)
    cheap = int(table.bits(chunk) / 8 * STATE_SHARE / STATE_BYTES)
    lanes = min(chunk.size, MOST_LANES, max(1, cheap, -(-chunk.size // MOST_ROWS)))
    symbols = (chunk.astype(np.int64) - table.low).astype(np.intp)
    states, words = _push(symbols, table, lanes)
    return varint(lanes) + states.astype("<u4").tobytes() + words.astype("<u2").tobytes()


def decode(data: bytes, count: int, dtype: np.dtype, head: bytes) -> NDArray:
    """Return `count` integers; raise `BadFile` for a stream that does not end where it must."""
    table = frequencies.parse(head)
    cursor = Cursor(data)
    lanes = cursor.varint()
    if not 1 <= lanes <= min(count, MOST_LANES) or -(-count // lanes) > MOST_ROWS:
        raise BadFile("lane count out of range", got=lanes)
    states = np.frombuffer(cursor.take(STATE_BYTES * lanes), "<u4").astype(np.uint32)
    stream = cursor.rest()
    if len(stream) % 2 or bool((states < BOTTOM).any()):
        raise BadFile("an entropy-coded stream is malformed")
    slots = _pull(states, np.frombuffer(stream, "<u2").astype(np.uint32), count, table)
    return within(table.slot_symbols()[slots] + table.low, dtype)


def _push(
    symbols: NDArray[np.intp], table: Frequencies, lanes: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    share = table.counts.astype(np.uint32)
    start = (np.cumsum(table.counts) - table.counts).astype(np.uint32)
    total, shift = np.uint32(1 << table.precision), np.uint32(32 - table.precision)
    # With q = x // share: q * total + x % share + start is x + q * (total - share) + start.
    share, other, start = share[symbols], (total - share)[symbols], start[symbols]
    limit = share << shift
    states = np.full(lanes, BOTTOM, np.uint32)
    words: list[NDArray[np.uint16]] = []
    for at in range((symbols.size - 1) // lanes * lanes, -1, -lanes):
        row = slice(at, at + lanes)
        live = states[: share[row].size]
        full = live >= limit[row]
        spilled = live[full]
        if spilled.size:
            words.append(spilled.astype(np.uint16))
            live[full] = spilled >> WORD
        live += live // share[row] * other[row] + start[row]
    words.reverse()
    return states, np.concatenate(words) if words else np.empty(0, np.uint16)


def _pull(
    states: NDArray[np.uint32], words: NDArray[np.uint32], count: int, table: Frequencies
) -> NDArray[np.uint16]:
    slots = np.empty(count, np.uint16)
    owner = table.slot_symbols()
    share = table.counts.astype(np.uint32)[owner]
    start = (np.cumsum(table.counts) - table.counts).astype(np.uint32)[owner]
    inside = np.arange(owner.size, dtype=np.uint32) - start
    shift, mask = np.uint32(table.precision), np.uint32(owner.size - 1)
    used = 0
    for at in range(0, count, states.size):
        live = states[: count - at]
        slot = live & mask
        slots[at : at + states.size] = slot
        live >>= shift
        live *= share.take(slot)
        live += inside.take(slot)
        dry = np.flatnonzero(live < BOTTOM)
        if dry.size:
            fresh = words[used : used + dry.size]
            if fresh.size != dry.size:
                raise BadFile("an entropy-coded stream ends too early")
            live[dry] = live[dry] << WORD | fresh
            used += dry.size
    if used != words.size or bool((states != BOTTOM).any()):
        raise BadFile("an entropy-coded stream does not end where it must")
    return slots
