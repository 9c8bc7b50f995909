"""Walking through bytes without ever reading past their end; variable-length integers."""

from __future__ import annotations

from karikomi.errors import BadFile

MOST_VARINT_BYTES = 9


def varint(value: int) -> bytes:
    """Return a non-negative integer as little-endian groups of seven bits (LEB128).

    >>> varint(300).hex()
    'ac02'
    """
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def signed_varint(value: int) -> bytes:
    """Return an integer with its sign in the lowest bit: 0, -1, 1, -2 become 0, 1, 2, 3."""
    return varint(value << 1 if value >= 0 else (-value << 1) - 1)


class Cursor:
    """A position in bytes; every read is checked and raises `BadFile` at the end."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        if count > len(self.data) - self.at:
            raise BadFile("the payload ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def rest(self) -> bytes:
        """Return all bytes that are left."""
        return self.take(len(self.data) - self.at)

    def varint(self) -> int:
        """Return the next variable-length integer; padded forms are refused."""
        value = 0
        for index in range(MOST_VARINT_BYTES):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                if byte == 0 and index:
                    break
                return value
        raise BadFile("a malformed integer in the payload")

    def signed_varint(self) -> int:
        """Return the next integer written by `signed_varint`."""
        value = self.varint()
        return -(value >> 1) - 1 if value & 1 else value >> 1

    def close(self) -> None:
        """Raise `BadFile` where bytes are left over."""
        if self.at != len(self.data):
            raise BadFile("bytes are left over in the payload", got=len(self.data) - self.at)
