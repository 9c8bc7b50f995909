"""Lists of float32: scales and codebook values, in as few bits as their exponents and mantissas have.

One byte says how: 0, a plane stream follows; 1, each number is its sign, its exponent less the smallest one, and the
part of its mantissa that any of them uses.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import BadFile
from karikomi.pack.codecs import bits, planes
from karikomi.pack.codecs.cursor import Cursor

FLOAT = np.dtype("<f4")
PLANES, FIELDS = 0, 1
MANTISSA, SIGN = 23, 31


def write(numbers: NDArray[np.float32]) -> bytes:
    """Return a list of float32 as stored; nothing for an empty one."""
    if not numbers.size:
        return b""
    whole = np.ascontiguousarray(numbers, FLOAT).view("<u4")
    fields = _fields(whole)
    other = bytes([PLANES]) + planes.write(whole.view(FLOAT))
    return min(fields, other, key=len)


def read(cursor: Cursor, count: int) -> NDArray[np.float32]:
    """Return the next `count` numbers."""
    if not count:
        return np.empty(0, np.float32)
    way = cursor.take(1)[0]
    if way == PLANES:
        return planes.read(cursor, count, FLOAT).astype(np.float32)
    if way != FIELDS:
        raise BadFile("a list of floats is coded in an unknown way", got=way)
    signed, wide, least, cut = cursor.take(4)
    if signed > 1 or wide > 8 or cut > MANTISSA or least + (1 << wide) - 1 > 255 + (1 << wide):
        raise BadFile("a list of floats is out of range")
    width = signed + wide + MANTISSA - cut
    packed = cursor.take((count * width + 7) // 8)
    whole = bits.decode(packed, count, np.dtype("<u4"), b"\0" + bytes([width]))
    kept = MANTISSA - cut
    exponent = (whole >> np.uint32(kept) & np.uint32((1 << wide) - 1)) + np.uint32(least)
    if int(exponent.max()) > 255:
        raise BadFile("a list of floats is out of range")
    mantissa = (whole & np.uint32((1 << kept) - 1)) << np.uint32(cut)
    sign = (whole >> np.uint32(kept + wide)) << np.uint32(SIGN)
    return (sign | exponent << np.uint32(MANTISSA) | mantissa).view(np.float32)


def _fields(whole: NDArray[np.uint32]) -> bytes:
    sign, exponent = whole >> SIGN, whole >> MANTISSA & 255
    mantissa = whole & (1 << MANTISSA) - 1
    used = int(np.bitwise_or.reduce(mantissa)) | 1 << MANTISSA
    cut = (used & -used).bit_length() - 1
    least = int(exponent.min())
    wide, signed = int(exponent.max() - least).bit_length(), int(sign.any())
    kept = MANTISSA - cut
    numbers = mantissa >> cut | exponent - np.uint32(least) << np.uint32(kept)
    numbers |= sign << np.uint32(kept + wide)
    width = signed + wide + kept
    head = bytes([FIELDS, signed, wide, least, cut])
    return head + bits.encode(numbers, b"\0" + bytes([width]))
