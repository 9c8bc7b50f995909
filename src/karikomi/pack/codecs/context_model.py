"""The model of ``contexts``: which energies share a table of frequencies, and the tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile
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
from karikomi.pack.codecs.neighbours import MOST_ENERGY

PRECISIONS = (12, 14)
MOST_CLASS, LAG_BITS = 63, 4
LEVELS = 2 * MOST_LEVEL + 1
SLOWER = 1.001
"""What the larger tables, which are slower to look up, must save."""
TABLE_BITS, KNOT_BITS = 8, 6.0
"""About what a table takes, and each of its knots."""


def _geometric(first: int, last: int, above: int, below: int) -> NDArray[np.int64]:
    found = [first]
    while found[-1] < last:
        found.append(max(found[-1] + 1, found[-1] * above // below))
    return np.array(found, np.int64)


# Each about 2**(1/4) and 2**(1/3) times the one before.
MEANS = np.append(0, _geometric(1, 16 * MOST_LEVEL, 19, 16))[: MOST_CLASS + 1]
"""The mean magnitudes that a tensor can state, in sixteenths of a level."""
BOUNDS = _geometric(1, MOST_ENERGY, 81, 64)
"""The lowest energy of each band but the first."""
BANDS = BOUNDS.size + 1
BAND_OF = np.searchsorted(BOUNDS, np.arange(MOST_ENERGY + 1), side="right").astype(np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class ContextModel:
    """What all chunks share: the lag, the stated mean of each tensor, for each table the band where it begins."""

    lag: int
    classes: tuple[int, ...]
    begins: tuple[int, ...]
    tables: tuple[LevelTable, ...]

    @property
    def precision(self) -> int:
        """The binary logarithm of the sum of the frequencies."""
        return self.tables[0].precision

    @property
    def table_of_band(self) -> NDArray[np.int64]:
        """The table of each band of energies."""
        return np.searchsorted(np.array(self.begins[1:], np.int64), np.arange(BANDS), side="right")

    def to_bytes(self) -> bytes:
        """Return the model as stored."""
        out = BitWriter()
        first = self.tables[0]
        out.number(PRECISIONS.index(first.precision), 1)
        out.number(first.detail, 2)
        out.number(self.lag, LAG_BITS)
        out.signed(np.diff(self.classes, prepend=0).tolist())
        marks = np.isin(np.arange(1, BANDS), self.begins[1:])
        for mark in marks.tolist():
            out.number(int(mark), 1)
        for side in (0, 1):
            before: tuple[int, ...] = ()
            for table in self.tables:
                stored = table.sides[side][side:]
                out.number(table.most[side] - 1, 8)
                out.signed(value - _near(stored[:at], before) for at, value in enumerate(stored))
                before = stored
        return out.close()


def fit(tallies: NDArray[np.int64], lag: int, classes: Sequence[int]) -> tuple[ContextModel, float]:
    """Return the model that makes levels smallest, and the bits they take; `tallies`: (BANDS, LEVELS)."""
    begins = _parted(tallies)
    parts = [tallies[a:b].sum(axis=0) for a, b in zip(begins, (*begins[1:], BANDS), strict=True)]
    models = (
        ContextModel(
            lag, tuple(classes), begins, tuple(fitted(part, precision, detail) for part in parts)
        )
        for precision in PRECISIONS
        for detail in range(FINEST + 1)
    )

    def coded(model: ContextModel) -> float:
        return sum(table.cost(part) for table, part in zip(model.tables, parts, strict=True))

    def cost(model: ContextModel) -> float:
        slow = SLOWER if model.precision > PRECISIONS[0] else 1
        return coded(model) * slow + 8 * len(model.to_bytes())

    best = min(models, key=cost)
    return best, coded(best)


def parse(data: bytes, tensors: int) -> ContextModel:
    """Return a stored model; raise `BadFile` for one that is not whole."""
    reader = BitReader(data)
    precision, detail = PRECISIONS[reader.number(1)], reader.number(2)
    lag = reader.number(LAG_BITS)
    if detail > FINEST or not lag:
        raise BadFile("a model of levels is out of range", got=f"{detail}, {lag}")
    classes = np.cumsum(np.array(reader.signed(tensors), np.int64)).tolist()
    if any(not 0 <= value < MEANS.size for value in classes):
        raise BadFile("the mean of a tensor is out of range")
    begins = (0, *(band for band in range(1, BANDS) if reader.number(1)))
    below = _read_sides(reader, detail, [()] * len(begins))
    above = _read_sides(reader, detail, [stored[:1] for _, stored in below])
    tables = (
        table_of(precision, detail, (most, other), (left, right))
        for (most, left), (other, right) in zip(below, above, strict=True)
    )
    reader.close()
    return ContextModel(lag, tuple(classes), begins, tuple(tables))


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


def _parted(tallies: NDArray[np.int64]) -> tuple[int, ...]:
    """Return the bands where tables begin: those that make tables and levels smallest together."""
    used = np.flatnonzero(tallies.any(axis=1))
    sums = np.concatenate([np.zeros((1, LEVELS), np.int64), np.cumsum(tallies[used], axis=0)])
    best, origin = [0.0], [0]
    for end in range(1, used.size + 1):
        parts = sums[end] - sums[:end]
        most = np.array([int(np.abs(np.flatnonzero(part) - MOST_LEVEL).max()) for part in parts])
        knots = np.array([len(knots_to(max(int(value), 1))) for value in most])
        costs = np.array(best) + entropies(parts) + TABLE_BITS + 2 * KNOT_BITS * knots
        origin.append(int(costs.argmin()))
        best.append(float(costs.min()))
    begins, end = [], used.size
    while end:
        end = origin[end]
        begins.append(int(used[end]))
    return 0, *begins[-2::-1]


def entropies(parts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the bits of ideal codes of the tallies in each row."""
    sums = parts.sum(axis=1)
    logs = np.log2(parts, where=parts > 0, out=np.zeros(parts.shape))
    return sums * np.log2(np.maximum(sums, 1)) - (parts * logs).sum(axis=1)
