"""Codec ``adaptive``: a binary range coder that learns while it codes, for the levels of small tensors.

No tables: each bit of a level has a probability per context, learnt from the bits before, and those of several
contexts are mixed in the logistic domain. Whether a level is zero depends on how often its column and those beside it
were not, and on the levels before it and above it; so a tensor with dead inputs and outputs takes far fewer bytes
than any static table can reach. It is slow, a few microseconds a level, and therefore for small tensors only.

Integers only. Sources: the range coder is `binary_range`; the mixing follows Mahoney, "Adaptive weighing of context
models for lossless data compression" (2005).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile
from karikomi.pack.codecs.binary_range import RangeDecoder, RangeEncoder
from karikomi.pack.codecs.level_tables import MOST_LEVEL
from karikomi.pack.codecs.mixing import Mixer, five_ways

NAME = "adaptive"
MOST_LEVELS = 2**19
"""Levels of a stream; who opens the file has to wait for each of them."""
MOST_EFFORT, NONZERO_EFFORT = 3 * 2**18, 24
"""What a writer codes so: levels, those that are not zero counted several times; more take seconds."""
LEARNT_BITS = 3
"""Bits after the leading one of a magnitude that have probabilities of their own; the rest are as good as random."""
COUNTS, ROWS, ENERGIES, TENSORS = 8, 8, 12, 64
"""Bounds of what a context distinguishes: counts of a column, octaves of the row, energies, tensors."""
NEAR, BESIDE, BOTH, ENERGY = 64, 128, 144, 208
"""Where the contexts of each way begin, after those of the column alone."""
CONTEXTS = ENERGY + TENSORS * ENERGIES

Shapes = Sequence[tuple[int, ...]]
Run = Callable[[Callable, Sequence[int]], list]
Coder = Callable[[int, int, int, int, int, bool], int]


def encode(
    levels: NDArray[np.int16], shapes: Shapes, symbols: int, run: Run
) -> tuple[bytes, list[bytes]] | None:
    """Return no tables and one chunk; ``None`` where the levels are too many, or there are none."""
    effort = levels.size + NONZERO_EFFORT * np.count_nonzero(levels)
    if not 0 < levels.size <= min(symbols, MOST_LEVELS) or effort > MOST_EFFORT:
        return None
    coder = RangeEncoder()
    _walk(shapes, coder.bit, levels.tolist())
    return b"", [coder.close()]


def decode(
    chunks: Sequence[bytes], shapes: Shapes, head: bytes, symbols: int, run: Run
) -> NDArray[np.int16]:
    """Return the levels; raise `BadFile` for a stream that is too long, or of too many levels."""
    count = sum(math.prod(shape) for shape in shapes)
    if head:
        raise BadFile("this codec has no table", got=f"{len(head)} bytes")
    if count > MOST_LEVELS:
        raise BadFile("too many levels for this codec", got=count, allowed=f"<= {MOST_LEVELS}")
    if len(chunks) != 1:
        if count:
            raise BadFile("wrong number of chunks for this codec", got=len(chunks), allowed=1)
        return np.empty(0, np.int16)
    coder = RangeDecoder(chunks[0])
    levels = _walk(shapes, coder.bit, None)
    coder.close()
    return np.array(levels, np.int16)


def _walk(shapes: Shapes, bit: Callable[[int, int], int], levels: list[int] | None) -> list[int]:
    """Code all levels of all tensors, and return them; ``None``: they come from `bit`."""
    out: list[int] = []
    is_zero, sizes = five_ways(bit, CONTEXTS, start=1 / 16), Mixer(bit, 2)
    for tensor, shape in enumerate(shapes):
        count = math.prod(shape)
        columns = max(count // shape[0], 1) if len(shape) > 1 and count else max(count, 1)
        part = None if levels is None else levels[len(out) : len(out) + count]
        out += _tensor(tensor, count, columns, is_zero, sizes, part)
    return out


def _tensor(
    tensor: int, count: int, columns: int, code: Coder, sizes: Mixer, levels: list[int] | None
) -> list[int]:
    """Code the levels of one tensor, row by row."""
    out: list[int] = [0] * count
    counts = [0] * (columns + 1)  # with a column of zeros on the right
    first, unknown = ENERGY + tensor % TENSORS * ENERGIES, [0] * columns
    for start in range(0, count, columns):
        octave = min((start // columns + 1).bit_length(), ROWS) - 1
        last = two = three = left = 0
        above = out[start - columns : start] if start else unknown
        given = unknown if levels is None else levels[start : start + columns]
        known = zip(given, above, counts[:-1], counts[1:], strict=True)
        for column, (level, up, seen, right) in enumerate(known):
            near = left + right
            energy = 2 * abs(last) + abs(two) + abs(up) if last or two or up else 0
            some = (seen if seen < COUNTS else COUNTS - 1) << 3
            beside = (4 if last else 0) | (2 if two else 0) | (1 if three else 0)
            nonzero = code(
                some | octave,
                (near if near < COUNTS else COUNTS - 1) << 3 | NEAR | octave,
                beside << 1 | BESIDE | (1 if up else 0),
                BOTH + (some | beside),
                first + (energy if energy < ENERGIES else ENERGIES - 1),
                level != 0,
            )
            three, two, left = two, last, seen
            last = 0
            if nonzero:
                last = out[start + column] = _size(tensor, two, energy, sizes, level)
                left = counts[column] = seen + 1
    return out


def _size(tensor: int, before: int, energy: int, mixer: Mixer, level: int) -> int:
    """Code a level that is not zero: its sign, the octave of its magnitude in unary, and the bits below its highest."""
    side = 0 if before == 0 else 1 if before > 0 else 2
    own, shared = tensor << 16, 1 << 40
    positive = mixer.code((own | side, shared | side), level > 0)
    size = abs(level)
    own |= positive << 15 | 1 << 14
    shared |= (energy.bit_length() if energy < 64 else 7) << 10 | 1 << 14
    octave = 0
    while octave < 7 and mixer.code((own | octave, shared | octave), size >> octave > 1):
        octave += 1
    own, shared = own | 1 << 13 | octave << 9, 1 << 40 | 1 << 13 | octave << 9
    found = 1
    for place in range(octave - 1, -1, -1):
        value = size >> place & 1
        if found < 1 << LEARNT_BITS:
            value = mixer.code((own | found, shared | found), value)
        else:
            value = mixer.bit(1 << 15, value)
        found = found << 1 | value
    if found > MOST_LEVEL:
        raise BadFile("a level is out of range", got=found)
    return found if positive else -found
