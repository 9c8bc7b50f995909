"""Codec ``contexts``: static range coding of levels, with a table that depends on the two levels before.

Levels are small signed integers, zero being the most frequent. Each lane codes a contiguous segment, so that the
decoder has the two levels before it in every lane at once. Their magnitudes and the mean magnitude of the tensor give
an energy; bands of energies share a frequency table. Several tensors can be one stream with the same tables.
Source: the energy contexts of lossless image coding (Wu, Memon, "CALIC", 1997), on static tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile
from karikomi.pack.codecs import lanes
from karikomi.pack.codecs.bit_numbers import BitReader, BitWriter
from karikomi.pack.codecs.level_tables import (
    FINEST,
    MOST_LEVEL,
    LevelTable,
    fitted,
    knots_to,
    limit,
    table_of,
)

NAME = "contexts"
Shapes = Sequence[tuple[int, ...]]
Run = Callable[[Callable, Sequence[int]], list]
PRECISIONS = (12, 14)
MOST_CLASS = 63
LEVELS = 2 * MOST_LEVEL + 1
LEAST_LEVELS = 256
SAMPLE = 2**18
LEAST_GAIN, PRICE, SLOWER = 0.996, 6.0, 1.001
"""Contexts must save so much; bits of a frequency in a table; what the larger tables must save."""


def _geometric(first: int, last: int, above: int, below: int) -> NDArray[np.int64]:
    found = [first]
    while found[-1] < last:
        found.append(max(found[-1] + 1, found[-1] * above // below))
    return np.array(found, np.int64)


# Each about 2**(1/4) and 2**(1/3) times the one before.
MEANS = np.append(0, _geometric(1, 16 * MOST_LEVEL, 19, 16))[: MOST_CLASS + 1]
"""The mean magnitudes that a tensor can state, in sixteenths of a level."""
BOUNDS = _geometric(1, 24 * MOST_LEVEL + 16 * MOST_LEVEL, 81, 64)
"""The lowest energy of each band but the first."""
BANDS = BOUNDS.size + 1
BAND_OF = np.searchsorted(BOUNDS, np.arange(40 * MOST_LEVEL + 1), side="right")


@dataclass(frozen=True, slots=True, eq=False)
class ContextModel:
    """What all chunks share: the stated mean of each tensor, and for each table the band where it begins."""

    classes: tuple[int, ...]
    begins: tuple[int, ...]
    tables: tuple[LevelTable, ...]

    @property
    def precision(self) -> int:
        """The binary logarithm of the sum of the frequencies."""
        return self.tables[0].precision

    @property
    def table_of_energy(self) -> NDArray[np.int64]:
        """The table of each energy."""
        return np.searchsorted(np.array(self.begins[1:], np.int64), BAND_OF, side="right")

    def to_bytes(self) -> bytes:
        """Return the model as stored."""
        out = BitWriter()
        first = self.tables[0]
        alike = all(table.sides[0] == table.sides[1] for table in self.tables)
        out.number(PRECISIONS.index(first.precision), 1)
        out.number(first.detail, 2)
        out.number(int(alike), 1)
        out.signed(np.diff(self.classes, prepend=0).tolist())
        marks = np.isin(np.arange(1, BANDS), self.begins[1:])
        for mark in marks.tolist():
            out.number(int(mark), 1)
        for side in (0,) if alike else (0, 1):
            before: tuple[int, ...] = ()
            for table in self.tables:
                stored = table.sides[side][side:]
                out.number(table.most[side] - 1, 8)
                out.signed(value - _near(stored[:at], before) for at, value in enumerate(stored))
                before = stored
        return out.close()


def encode(
    levels: NDArray[np.int16], shapes: Shapes, symbols: int, run: Run
) -> tuple[bytes, list[bytes]] | None:
    """Return the model, and the lanes of each chunk; ``None`` where the levels before say nothing."""
    if levels.size < LEAST_LEVELS or not promising(levels):
        return None
    sizes = [math.prod(shape) for shape in shapes]
    model, bits = fit(levels, sizes)
    cuts = range(0, levels.size, symbols)

    def chunk(at: int) -> bytes:
        part = levels[at : at + symbols]
        return encode_chunk(
            part, _sizes_within(sizes, at, part.size), model, bits * part.size / levels.size
        )

    return model.to_bytes(), run(chunk, cuts)


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
        part[:] = decode_chunk(
            chunks[index], _sizes_within(sizes, index * symbols, part.size), model
        )

    run(fill, range(len(chunks)))
    return out


def promising(levels: NDArray[np.int16]) -> bool:
    """Return whether a part from the middle takes fewer bits with a table for each energy than with a single one."""
    middle = max((levels.size - SAMPLE) // 2, 0)
    part = levels[middle : middle + SAMPLE]
    tallies = _tallies(part, [part.size], _classes(part, [part.size]))
    tallies = tallies[tallies.any(axis=1)]
    plain, parted = _entropies(tallies.sum(axis=0, keepdims=True)).sum(), _entropies(tallies).sum()
    symbols = np.count_nonzero(tallies)
    return bool(parted + PRICE * symbols < LEAST_GAIN * plain)


def fit(levels: NDArray[np.int16], sizes: Sequence[int]) -> tuple[ContextModel, float]:
    """Return the model that makes these levels of several tensors smallest, and the bits they take."""
    classes = _classes(levels, sizes)
    tallies = _tallies(levels, sizes, classes)
    begins = _parted(tallies)
    parts = [tallies[a:b].sum(axis=0) for a, b in zip(begins, (*begins[1:], BANDS), strict=True)]
    models = (
        ContextModel(
            classes, begins, tuple(fitted(part, precision, detail, alike) for part in parts)
        )
        for precision in PRECISIONS
        for detail in range(FINEST + 1)
        for alike in (True, False)
    )

    def coded(model: ContextModel) -> float:
        return sum(table.cost(part) for table, part in zip(model.tables, parts, strict=True))

    def cost(model: ContextModel) -> float:
        # A larger table is slower to look up: it has to earn its place.
        slow = SLOWER if model.precision > PRECISIONS[0] else 1
        return coded(model) * slow + 8 * len(model.to_bytes())

    best = min(models, key=cost)
    return best, coded(best)


def parse(data: bytes, tensors: int) -> ContextModel:
    """Return a stored model; raise `BadFile` for one that is not whole."""
    reader = BitReader(data)
    precision, detail, alike = PRECISIONS[reader.number(1)], reader.number(2), reader.number(1)
    if detail > FINEST:
        raise BadFile("a table of levels has an unknown detail", got=detail)
    classes = np.cumsum(np.array(reader.signed(tensors), np.int64)).tolist()
    if any(not 0 <= value < MEANS.size for value in classes):
        raise BadFile("the mean of a tensor is out of range")
    begins = (0, *(band for band in range(1, BANDS) if reader.number(1)))
    below = _read_sides(reader, detail, [()] * len(begins))
    above = below if alike else _read_sides(reader, detail, [stored[:1] for _, stored in below])
    tables = (
        table_of(precision, detail, (most, other), (left, right))
        for (most, left), (other, right) in zip(below, above, strict=True)
    )
    reader.close()
    return ContextModel(tuple(classes), begins, tuple(tables))


def _read_sides(
    reader: BitReader, detail: int, zeros: list[tuple[int, ...]]
) -> list[tuple[int, tuple[int, ...]]]:
    """Return the largest magnitude and the exponents of one side of each table; `zeros`: what is known already."""
    found = []
    before: tuple[int, ...] = ()
    for zero in zeros:
        most = reader.number(8) + 1
        if most > MOST_LEVEL:
            raise BadFile("a table of levels is out of range", got=most)
        stored: tuple[int, ...] = ()
        for difference in reader.signed(len(knots_to(most)) - len(zero)):
            stored += (difference + _near(stored, before),)
            if not 0 <= stored[-1] < limit(detail):
                raise BadFile("a weight of a level is out of range")
        found.append((most, zero + stored))
        before = stored
    return found


def _near(stored: tuple[int, ...], before: tuple[int, ...]) -> int:
    """Return what the next exponent is close to: the last one, and as far from it as in the table before."""
    place = len(stored)
    if not stored:
        return before[0] if before else 0
    rise = before[place] - before[place - 1] if place < len(before) else 0
    return stored[-1] + rise


def encode_chunk(
    levels: NDArray[np.int16], sizes: Sequence[int], model: ContextModel, bits: float
) -> bytes:
    """Return the lanes of levels of several tensors, one after the other; `bits`: about as many as they take."""
    width, steps = _shape(levels.size, lanes.lanes_for(levels.size, bits))
    energies = _energies(np.abs(levels), sizes, model.classes, steps)
    counts, starts, base, _ = _joined(model)
    at = base.take(model.table_of_energy.take(energies))
    at += levels
    short = levels.size - (width - 1) * steps
    at = np.append(at, np.zeros(width * steps - levels.size, at.dtype)).reshape(width, steps).T
    rows = (
        slice(step * width, (step + 1) * width - (step >= short))
        for step in range(steps - 1, -1, -1)
    )
    at = np.ascontiguousarray(at).reshape(-1)
    return lanes.write(*lanes.push(counts.take(at), starts.take(at), rows, model.precision))


def decode_chunk(data: bytes, sizes: Sequence[int], model: ContextModel) -> NDArray[np.int16]:
    """Return the levels; raise `BadFile` for a stream that does not end where it must."""
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
    level = level[owner]
    magnitude = np.abs(level).astype(np.int64)
    first_slot = model.table_of_energy << precision
    stated = _stated(sizes, model.classes, width, steps)
    out = np.empty((steps, width), np.int16)
    states, mask, short = lane.states, (1 << precision) - 1, count - (width - 1) * steps
    previous = earlier = np.zeros(width, np.int64)
    # The last segment may be shorter than the others.
    for live, some in ((states, range(short)), (states[:-1], range(short, steps))):
        previous, earlier = previous[: live.size], earlier[: live.size]
        for step in some:
            energy = previous << 1
            energy += earlier
            energy <<= 3
            energy += stated[step % len(stated), : live.size]
            slot = live & mask
            slot += first_slot.take(energy)
            live >>= precision
            live *= share.take(slot)
            live += inside.take(slot)
            out[step, : live.size] = level.take(slot)
            earlier, previous = previous, magnitude.take(slot)
            lane.refill(live)
    lane.close()
    return np.ascontiguousarray(out.T).reshape(-1)[:count]


def _shape(count: int, width: int) -> tuple[int, int]:
    """Return the lanes and the steps of `count` symbols in about `width` segments."""
    steps = -(-count // width)
    return -(-count // steps), steps


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


def _tallies(
    levels: NDArray[np.int16], sizes: Sequence[int], classes: Sequence[int]
) -> NDArray[np.int64]:
    """Return how often each level comes in each band of energies."""
    tallies = np.zeros(BANDS * LEVELS, np.int64)
    for at in range(
        0, levels.size, SAMPLE
    ):  # in pieces: a few large arrays would not fit into the cache
        part = levels[at : at + SAMPLE]
        energies = _energies(np.abs(part), _sizes_within(sizes, at, part.size), classes, part.size)
        places = BAND_OF.take(energies)
        places *= LEVELS
        places += part
        tallies += np.bincount(places + MOST_LEVEL, minlength=tallies.size)
    return tallies.reshape(BANDS, LEVELS)


def _energies(
    magnitudes: NDArray[np.int16], sizes: Sequence[int], classes: Sequence[int], steps: int
) -> NDArray[np.int64]:
    """Return the energy before each level; the first ones of a segment of `steps` have none before them."""
    before = np.zeros(magnitudes.size + 2, np.int64)
    before[2:] = magnitudes
    previous, earlier = before[1:-1], before[:-2].copy()
    starts = np.arange(0, magnitudes.size, steps)
    earlier[starts] = 0
    earlier[starts[starts + 1 < magnitudes.size] + 1] = 0
    energy = 2 * previous
    energy[starts] = 0
    energy += earlier
    energy <<= 3
    energy += np.repeat(MEANS[list(classes)], sizes)
    return energy


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


def _parted(tallies: NDArray[np.int64]) -> tuple[int, ...]:
    """Return the bands where tables begin: those that make tables and levels smallest together."""
    used = np.flatnonzero(tallies.any(axis=1))
    sums = np.concatenate([np.zeros((1, LEVELS), np.int64), np.cumsum(tallies[used], axis=0)])
    best, origin = [0.0], [0]
    for end in range(1, used.size + 1):
        parts = sums[end] - sums[:end]
        most = np.array([int(np.abs(np.flatnonzero(part) - MOST_LEVEL).max()) for part in parts])
        knots = np.array([len(knots_to(max(int(value), 1))) for value in most])
        costs = np.array(best) + _entropies(parts) + 8 + 6.0 * knots
        origin.append(int(costs.argmin()))
        best.append(float(costs.min()))
    begins, end = [], used.size
    while end:
        end = origin[end]
        begins.append(int(used[end]))
    return 0, *begins[-2::-1]


def _entropies(parts: NDArray[np.int64]) -> NDArray[np.float64]:
    sums = parts.sum(axis=1)
    logs = np.log2(parts, where=parts > 0, out=np.zeros(parts.shape))
    return sums * np.log2(sums) - (parts * logs).sum(axis=1)
