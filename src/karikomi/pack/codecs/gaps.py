"""Codec ``gaps``: distances between non-zeros and the non-zeros themselves, as in Deep Compression.

One byte symbol per non-zero gives the zeros before it; ``cap`` is a filler that skips `cap` zeros
and carries no value. Both streams go through zlib's Huffman-only strategy (or what beats it).
Source: Han, Mao, Dally, ICLR 2016; there fillers store a zero weight and the width is the same for
all layers, here the width is chosen per tensor.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile
from karikomi.pack.codecs import planes
from karikomi.pack.codecs.cursor import Cursor, varint

NAME = "gaps"
SYMBOL = np.dtype(np.uint8)
WIDTHS = range(1, 9)
# Denser tensors gain nothing from positions.
MOST_DENSITY = 0.75


def fit(flat: NDArray) -> bytes | None:
    """Return the gap width in bits as one byte, or ``None`` for a dense tensor."""
    places = _places(flat)
    if not flat.size or places.size > MOST_DENSITY * flat.size:
        return None
    counts = np.bincount(_gaps(places))
    gaps = np.flatnonzero(counts)
    counts = counts[gaps]
    return bytes([min(WIDTHS, key=lambda width: _cost(gaps, counts, 2**width - 1))])


def floor(flat: NDArray, head: bytes) -> int:
    """Return a lower bound of the coded bytes: unknown before it is done."""
    return 0


def encode(chunk: NDArray, head: bytes) -> bytes:
    """Return the counts, the gap stream and the stream of non-zero values."""
    cap = _cap(head)
    places = _places(chunk)
    fillers, last = np.divmod(_gaps(places), cap)
    ends = np.cumsum(fillers + 1)
    symbols = np.full(int(ends[-1]) if ends.size else 0, cap, SYMBOL)
    symbols[ends - 1] = last
    counts = varint(places.size) + varint(symbols.size)
    return counts + planes.write(symbols) + planes.write(chunk[places])


def decode(data: bytes, count: int, dtype: np.dtype, head: bytes) -> NDArray:
    """Return `count` numbers; raise `BadFile` where gaps and values do not describe them."""
    cap = _cap(head)
    cursor = Cursor(data)
    nonzero, total = cursor.varint(), cursor.varint()
    if nonzero > count or not nonzero <= total <= nonzero + count // cap:
        raise BadFile(
            "impossible numbers of gaps and values",
            got=f"{total} and {nonzero}",
            allowed=f"values <= {count}",
        )
    symbols = planes.read(cursor, total, SYMBOL)
    values = planes.read(cursor, nonzero, dtype)
    cursor.close()
    out = np.zeros(count, dtype)
    out[_follow(symbols, cap, nonzero, count)] = values
    if _places(values).size != nonzero:
        raise BadFile("a zero among the non-zero values")
    return out


def index_bytes(data: bytes) -> int:
    """Return how many bytes of a valid chunk tell where the non-zeros are."""
    cursor = Cursor(data)
    _, total = cursor.varint(), cursor.varint()
    planes.read(cursor, total, SYMBOL)
    return cursor.at


def _follow(symbols: NDArray[np.uint8], cap: int, nonzero: int, count: int) -> NDArray[np.intp]:
    marks = symbols < cap
    if symbols.size and (int(symbols.max()) > cap or not marks[-1]):
        raise BadFile("a gap symbol is out of range", allowed=f"0..{cap}, a value at the end")
    places = np.cumsum(symbols + marks.astype(np.int64))[marks] - 1
    if places.size != nonzero or (nonzero and int(places[-1]) >= count):
        raise BadFile(
            "the gaps lead out of the tensor",
            got=f"{places.size} places",
            allowed=f"{nonzero} places below {count}",
        )
    return places


def _places(flat: NDArray) -> NDArray[np.intp]:
    # By bits, not by value: -0.0 is a number to keep.
    return np.flatnonzero(flat.view(f"<u{flat.dtype.itemsize}"))


def _gaps(places: NDArray[np.intp]) -> NDArray[np.intp]:
    return np.diff(places, prepend=-1) - 1


def _cost(gaps: NDArray[np.intp], counts: NDArray[np.intp], cap: int) -> float:
    tally = np.bincount(gaps % cap, weights=counts, minlength=cap + 1)
    tally[cap] += float((gaps // cap * counts).sum())
    return planes.entropy(tally)


def _cap(head: bytes) -> int:
    if len(head) != 1 or head[0] not in WIDTHS:
        raise BadFile("gap width out of range", got=list(head[:4]), allowed="1..8")
    return 2 ** head[0] - 1
