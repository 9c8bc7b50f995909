"""Codec ``rans``: static range coding, many lanes side by side, integers only.

Lane `i` codes the symbols i, i + lanes, i + 2 lanes ... Decoding is gather, multiply, mask; see `lanes`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from karikomi.pack.codecs import frequencies
from karikomi.pack.codecs import rans_lanes as lanes
from karikomi.pack.codecs.bits import within
from karikomi.pack.codecs.frequencies import Frequencies

NAME = "rans"


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
    width = lanes.lanes_for(chunk.size, table.bits(chunk))
    symbols = chunk.astype(np.int32 if chunk.dtype.itemsize <= 2 else np.int64) - table.low
    share = table.counts.astype(np.uint32)
    start = (np.cumsum(table.counts) - table.counts).astype(np.uint32)
    rows = [
        slice(at, min(at + width, chunk.size))
        for at in range((chunk.size - 1) // width * width, -1, -width)
    ]
    return lanes.write(*lanes.push(share.take(symbols), start.take(symbols), rows, table.precision))


def decode(data: bytes, count: int, dtype: np.dtype, head: bytes) -> NDArray:
    """Return `count` integers; raise `BadFile` for a stream that does not end where it must."""
    table = frequencies.parse(head)
    slots = _pull(lanes.Lanes(data, count), count, table)
    values = np.arange(table.low, table.low + table.counts.size, dtype=np.int64)
    bounds = np.iinfo(dtype)
    fitting = bounds.min <= values[0] and values[-1] <= bounds.max
    values = (values.astype(dtype) if fitting else values).take(table.slot_symbols())
    return within(values.take(slots), dtype)


def _pull(lane: lanes.Lanes, count: int, table: Frequencies) -> NDArray[np.uint16]:
    slots = np.empty(count, np.uint16)
    owner = table.slot_symbols()
    share = table.counts[owner]
    inside = np.arange(owner.size) - (np.cumsum(table.counts) - table.counts)[owner]
    shift, mask, states = table.precision, owner.size - 1, lane.states
    for at in range(0, count, states.size):
        live = states[: count - at]
        slot = live & mask
        slots[at : at + states.size] = slot
        live >>= shift
        live *= share.take(slot)
        live += inside.take(slot)
        lane.refill(live)
    lane.close()
    return slots
