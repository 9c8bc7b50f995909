"""Codec ``contexts``: static range coding of levels, with a table that depends on the levels before.

Levels are small signed integers, zero being the most frequent. Each lane codes a contiguous segment, so that the
decoder has the levels before it in every lane at once. They give an energy, and bands of energies share a frequency
table; and they give a likely sign: where it is negative, the level is coded with its sign changed. Several tensors can
be one stream with the same tables. Source: the contexts of lossless image coding, its energies and sign flipping (Wu,
Memon, "CALIC", 1997), on static tables.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile
from karikomi.pack.codecs import rans_lanes as lanes
from karikomi.pack.codecs.context_model import (
    BAND_OF,
    BANDS,
    LAG_BITS,
    LEVELS,
    MEANS,
    ContextModel,
    entropies,
    fit,
    parse,
)
from karikomi.pack.codecs.level_tables import MOST_LEVEL
from karikomi.pack.codecs.neighbours import Neighbours, contexts_of

NAME = "contexts"
LEAST_LEVELS = 256
SAMPLE, SAMPLE_LANES = 2**16, 64
LEAST_GAIN, PRICE = 0.996, 6.0
"""Contexts must save so much on a sample, where a frequency in a table takes so many bits."""
STATE_SHARE = 0.0075
"""More lanes than with a single table: a step does more, and half of what contexts save buys three times the speed."""
LAG = 3
"""Where no kernel says how long its rows are."""
PIECE = 2**16

Shapes = Sequence[tuple[int, ...]]
Run = Callable[[Callable, Sequence[int]], list]


class Walked(NamedTuple):
    """The bands and the levels of a chunk, their signs changed, step by step: (steps, lanes)."""

    bands: NDArray[np.uint8]
    levels: NDArray[np.int16]


def encode(
    levels: NDArray[np.int16], shapes: Shapes, symbols: int, run: Run
) -> tuple[bytes, list[bytes]] | None:
    """Return the model, and the lanes of each chunk; ``None`` where the levels before say little."""
    lag = _lag(shapes)
    if levels.size < LEAST_LEVELS or not _promising(levels, lag):
        return None
    sizes = [math.prod(shape) for shape in shapes]
    classes = _classes(levels, sizes)
    bits = float(entropies(np.bincount(levels + MOST_LEVEL)[None])[0])
    share = bits / levels.size

    def walk(at: int) -> Walked:
        part = levels[at : at + symbols]
        width = lanes.lanes_for(part.size, share * part.size, STATE_SHARE)
        return _walk(part, _sizes_within(sizes, at, part.size), classes, lag, width)

    walked = run(walk, range(0, levels.size, symbols))
    tallies = np.sum([*map(_tallies, walked, _counts(levels.size, symbols))], axis=0)
    model, _ = fit(tallies, lag, classes)

    def chunk(index: int) -> bytes:
        return _pushed(walked[index], _counts(levels.size, symbols)[index], model)

    return model.to_bytes(), run(chunk, range(len(walked)))


def decode(
    chunks: Sequence[bytes], shapes: Shapes, head: bytes, symbols: int, run: Run
) -> NDArray[np.int16]:
    """Return the levels; raise `BadFile` for a damaged model or stream."""
    sizes = [math.prod(shape) for shape in shapes]
    if not chunks:
        return np.empty(0, np.int16)
    model = parse(head, len(sizes))
    out = np.empty(sum(sizes), np.int16)

    def fill(index: int) -> None:
        part = out[index * symbols : (index + 1) * symbols]
        part[:] = _pulled(chunks[index], _sizes_within(sizes, index * symbols, part.size), model)

    run(fill, range(len(chunks)))
    return out


def _counts(size: int, symbols: int) -> list[int]:
    """Return how many symbols each chunk has."""
    return [min(symbols, size - at) for at in range(0, size, symbols)]


def _lag(shapes: Shapes) -> int:
    """Return the length of the rows of most kernels: a weight resembles the one above it."""
    rows: Counter[int] = Counter()
    for shape in shapes:
        if len(shape) > 2 and 1 < shape[-1] < 1 << LAG_BITS:
            rows[shape[-1]] += math.prod(shape)
    return max(rows, key=lambda row: (rows[row], -row), default=LAG)


def _promising(levels: NDArray[np.int16], lag: int) -> bool:
    """Return whether a part from the middle takes fewer bits with a table for each energy than with a single one."""
    middle = max((levels.size - SAMPLE) // 2, 0)
    part = levels[middle : middle + SAMPLE]
    walked = _walk(
        part, [part.size], _classes(part, [part.size]), lag, min(SAMPLE_LANES, part.size)
    )
    tallies = _tallies(walked, part.size)
    single = np.bincount(part + MOST_LEVEL)
    plain = float(entropies(single[None])[0]) + PRICE * np.count_nonzero(single)
    parted = float(entropies(tallies[tallies.any(axis=1)]).sum())
    # Bands that are merged later take fewer tables: the price is of half of them.
    return parted + PRICE / 2 * np.count_nonzero(tallies) < LEAST_GAIN * plain


def _walk(
    levels: NDArray[np.int16], sizes: Sequence[int], classes: Sequence[int], lag: int, width: int
) -> Walked:
    width, steps = _shape(levels.size, width)
    short = levels.size - (width - 1) * steps
    padded = np.append(levels, np.zeros(width * steps - levels.size, np.int16))
    matrix = np.ascontiguousarray(padded.reshape(width, steps).T)
    bands, coded = np.empty((steps, width), np.uint8), np.empty_like(matrix)
    for rows, energy, lean in contexts_of(matrix, _stated(sizes, classes, width, steps), lag):
        bands[rows] = BAND_OF.take(energy)
        coded[rows] = np.where(lean < 0, -matrix[rows], matrix[rows])
    bands[short:, -1:] = 0
    return Walked(bands, coded)


def _tallies(walked: Walked, count: int) -> NDArray[np.int64]:
    """Return how often each level comes in each band of energies."""
    tallies = np.zeros(BANDS * LEVELS, np.int64)
    bands, levels = walked.bands.reshape(-1), walked.levels.reshape(-1)
    for at in range(
        0, levels.size, PIECE
    ):  # in pieces: a few large arrays would not fit into the cache
        places = bands[at : at + PIECE].astype(np.int64)
        places *= LEVELS
        places += levels[at : at + PIECE]
        tallies += np.bincount(places + MOST_LEVEL, minlength=tallies.size)
    tallies[MOST_LEVEL] -= levels.size - count  # the fill of the last lane: zeros in the first band
    return tallies.reshape(BANDS, LEVELS)


def _pushed(walked: Walked, count: int, model: ContextModel) -> bytes:
    steps, width = walked.levels.shape
    counts, starts, base, _ = _joined(model)
    at = base.take(model.table_of_band).take(walked.bands)
    at += walked.levels
    short = count - (width - 1) * steps
    rows = (
        slice(step * width, (step + 1) * width - (step >= short))
        for step in range(steps - 1, -1, -1)
    )
    at = at.reshape(-1)
    return lanes.write(*lanes.push(counts.take(at), starts.take(at), rows, model.precision))


def _pulled(data: bytes, sizes: Sequence[int], model: ContextModel) -> NDArray[np.int16]:
    count = sum(sizes)
    lane = lanes.Lanes(data, count)
    width, steps = _shape(count, lane.states.size)
    if width != lane.states.size:
        raise BadFile("lane count out of range", got=lane.states.size, allowed=width)
    counts, starts, _, level = _joined(model)
    precision = model.precision
    # For each table and slot: the level, its frequency, and the slot's place in it.
    owner = np.repeat(np.arange(counts.size), counts)
    share = counts[owner].astype(np.int64)
    inside = np.arange(owner.size) % (1 << precision) - starts[owner]
    level = level[owner].astype(np.int64)
    first_slot = model.table_of_band.take(BAND_OF) << precision
    out = np.empty((steps, width), np.int16)
    states, mask, short = lane.states, (1 << precision) - 1, count - (width - 1) * steps
    before = Neighbours(_stated(sizes, model.classes, width, steps), model.lag)
    live = states
    for step in range(steps):
        if step == short:
            live = states[:-1]
            before.drop_last()
        energy, lean = before.context()
        slot = live & mask
        slot += first_slot.take(energy)
        live >>= precision
        live *= share.take(slot)
        live += inside.take(slot)
        found = level.take(slot)
        np.negative(found, out=found, where=lean < 0)
        out[step, : found.size] = found
        before.push(found)
        lane.refill(live)
    lane.close()
    return np.ascontiguousarray(out.T).reshape(-1)[:count]


def _shape(count: int, width: int) -> tuple[int, int]:
    """Return the lanes and the steps of `count` symbols in about `width` segments."""
    steps = -(-count // width)
    return -(-count // steps), steps


def _stated(
    sizes: Sequence[int], classes: Sequence[int], width: int, steps: int
) -> NDArray[np.int64]:
    """Return the stated mean before each level, step by step; one row where all are the same."""
    means = MEANS[list(classes)]
    if np.unique(means).size <= 1:
        return np.full((1, width), means[0] if means.size else 0)
    flat = np.repeat(means, sizes)
    flat = np.append(flat, np.zeros(width * steps - flat.size, np.int64))
    return np.ascontiguousarray(flat.reshape(width, steps).T)


def _sizes_within(sizes: Sequence[int], at: int, count: int) -> list[int]:
    """Return how many of the `count` symbols from `at` on belong to each tensor."""
    ends = np.cumsum(sizes)
    within = np.minimum(ends, at + count) - np.maximum(ends - sizes, at)
    return np.maximum(within, 0).tolist()


def _classes(
    levels: NDArray[np.int16], sizes: Sequence[int] | NDArray[np.int64]
) -> tuple[int, ...]:
    sums = np.append(0, np.cumsum(np.abs(levels), dtype=np.int64))
    ends, sizes = np.cumsum(sizes), np.array(sizes, np.int64)
    means = (sums[ends] - sums[ends - sizes]) / np.maximum(sizes, 1)
    return tuple(int(np.abs(MEANS - 16 * mean).argmin()) for mean in means)


def _joined(
    model: ContextModel,
) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.int64], NDArray[np.int16]]:
    """Return frequencies, starts and levels of all tables, one after the other, and where each has its zero."""
    counts = np.concatenate([table.counts for table in model.tables])
    starts = np.concatenate([np.cumsum(table.counts) - table.counts for table in model.tables])
    levels = np.concatenate(
        [np.arange(-table.most[0], table.most[1] + 1) for table in model.tables]
    )
    return (
        counts.astype(np.uint32),
        starts.astype(np.uint32),
        np.flatnonzero(levels == 0),
        levels.astype(np.int16),
    )
