"""Integer frequency tables for ``rans``: chosen by their whole cost, stored in a few bytes.

A table is a list of short floats: 4 bits for the length of a frequency, a few bits for what follows its
leading one. Fewer bits make a smaller table and a coarser model, so all settings are tried and the
cheapest is kept. The most frequent symbol is not stored: it gets what is left of 2**precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile
from karikomi.pack.codecs.bits import BEYOND
from karikomi.pack.codecs.cursor import Cursor, signed_varint, varint

PRECISIONS = (12, 13, 14)
DETAILS = range(8)
MOST_SYMBOLS = 4096
LENGTH_BITS = 4
PIECE = 2**16
"""Symbols that are counted at once, so that their wide copies stay in the cache."""


@dataclass(frozen=True, slots=True, eq=False)
class Frequencies:
    """Frequencies of the integers ``low, low + 1, ...``, summing to ``2**precision``.

    `peak` is the index that is not stored, `detail` the bits kept behind the leading one.
    """

    low: int
    precision: int
    detail: int
    peak: int
    counts: NDArray[np.int64]

    def bits(self, flat: NDArray) -> float:
        """Return the bits that `flat` costs under this table, without states and table."""
        return _cost(_tally(flat, self.low, self.counts.size), self)

    @property
    def stored_bytes(self) -> int:
        """The length of `to_bytes`."""
        lengths = np.frexp(np.delete(self.counts, self.peak))[1]
        digits = int((LENGTH_BITS + np.clip(lengths - 1, 0, self.detail)).sum())
        head = signed_varint(self.low) + varint(self.counts.size) + varint(self.peak)
        return 1 + len(head) + digits // 8 + 1

    def slot_symbols(self) -> NDArray[np.intp]:
        """Return for each of the ``2**precision`` slots the index of the symbol that owns it."""
        return np.repeat(np.arange(self.counts.size), self.counts)

    def to_bytes(self) -> bytes:
        """Return the table as stored: settings, smallest symbol, size, peak, short floats."""
        setting = bytes([(self.precision - PRECISIONS[0]) * len(DETAILS) + self.detail])
        text = "".join(_short(int(n), self.detail) for n in np.delete(self.counts, self.peak))
        body = int("1" + text, 2).to_bytes(len(text) // 8 + 1, "big") if text else b""
        # The leading 1 marks where the floats begin, so that no length has to be stored.
        return (
            setting + signed_varint(self.low) + varint(self.counts.size) + varint(self.peak) + body
        )


def fit(flat: NDArray) -> Frequencies | None:
    """Return the table that makes `flat` smallest, or ``None`` where none applies."""
    if flat.dtype.kind not in "iu" or not flat.size:
        return None
    low, high = int(flat.min()), int(flat.max())
    if not 2 <= high - low + 1 <= MOST_SYMBOLS or max(-low, high) >= BEYOND:
        return None
    tally = _tally(flat, low, high - low + 1)
    tables = (_table(tally, low, *setting) for setting in product(PRECISIONS, DETAILS))
    fitting = [table for table in tables if table is not None]
    if not fitting:
        return None
    return min(fitting, key=lambda table: _cost(tally, table) + 8 * table.stored_bytes)


def parse(head: bytes) -> Frequencies:
    """Return a stored table; raise `BadFile` for one that is not whole."""
    cursor = Cursor(head)
    above, detail = divmod(cursor.take(1)[0], len(DETAILS))
    low, size, peak = cursor.signed_varint(), cursor.varint(), cursor.varint()
    if above >= len(PRECISIONS) or not 2 <= size <= MOST_SYMBOLS or peak >= size:
        raise BadFile("a frequency table is out of range")
    precision = PRECISIONS[above]
    counts = _parse_shorts(cursor.rest(), size - 1, detail)
    left = (1 << precision) - sum(counts)
    if left < 1 or left == 1 << precision:
        raise BadFile("a frequency table does not sum to a power of two")
    counts.insert(peak, left)
    return Frequencies(low, precision, detail, peak, np.array(counts, np.int64))


def _table(tally: NDArray[np.int64], low: int, precision: int, detail: int) -> Frequencies | None:
    wanted = np.maximum(np.rint(tally * ((1 << precision) / tally.sum())), tally > 0)
    # frexp: wanted = mantissa * 2**length, so the lowest kept bit weighs 2**(length - 1 - detail).
    step = np.exp2(np.maximum(np.frexp(wanted)[1] - 1 - detail, 0))
    counts = (np.rint(wanted / step) * step).astype(np.int64)
    peak = int(tally.argmax())
    counts[peak] = 0
    counts[peak] = (1 << precision) - counts.sum()
    return Frequencies(low, precision, detail, peak, counts) if counts[peak] > 0 else None


def _tally(flat: NDArray, low: int, size: int) -> NDArray[np.int64]:
    tally = np.zeros(size, np.int64)
    for at in range(0, flat.size, PIECE):
        tally += np.bincount(flat[at : at + PIECE].astype(np.int64) - low, minlength=size)
    return tally


def _cost(tally: NDArray[np.int64], table: Frequencies) -> float:
    used = tally > 0
    return float((tally[used] * (table.precision - np.log2(table.counts[used]))).sum())


def _short(count: int, detail: int) -> str:
    length = count.bit_length()
    kept = min(max(length - 1, 0), detail)
    return f"{length:04b}" + f"{count:b}"[1 : 1 + kept]


def _parse_shorts(data: bytes, size: int, detail: int) -> list[int]:
    text = f"{int.from_bytes(data, 'big'):b}"[1:]
    counts, at = [], 0
    for _ in range(size):
        length = int(text[at : at + LENGTH_BITS] or "0", 2)
        kept = min(max(length - 1, 0), detail)
        at += LENGTH_BITS + kept
        if at > len(text):
            raise BadFile("a frequency table ends too early")
        digits = "1" + text[at - kept : at] if length else ""
        counts.append(int(digits.ljust(length, "0") or "0", 2))
    if at != len(text) or len(data) != len(text) // 8 + 1:
        raise BadFile("bytes are left over in a frequency table")
    return counts
