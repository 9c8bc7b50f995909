"""A binary range coder on 16-bit probabilities: Martin, "Range encoding" (1979), in 32 bits with bytes as digits."""

from __future__ import annotations

from karikomi.errors import BadFile

BITS = 16
"""Bits of a probability; it must be in 1 .. 2**16 - 1."""
FULL, LEAST = (1 << 32) - 1, 1 << 24


class RangeEncoder:
    """Writes bits, each under a probability of being 1."""

    __slots__ = ("low", "out", "span")

    def __init__(self) -> None:
        self.low, self.span = 0, FULL
        self.out = bytearray()

    def bit(self, chance: int, value: int) -> int:
        """Write `value`, whose probability of being 1 is `chance` of 65536, and return it."""
        bound = (self.span >> BITS) * chance
        if value:
            self.span = bound
        else:
            self.low += bound
            self.span -= bound
        while self.span < LEAST:
            self._shift()
            self.span <<= 8
        return value

    def close(self) -> bytes:
        """Return the bytes: as few as tell this stream from all others, if zeros follow them."""
        # Of the numbers in [low, low + span) the one with the most zeros at its end.
        high = self.low + self.span - 1
        for zeros in (32, 24, 16, 8, 0):
            value = high >> zeros << zeros
            if value >= self.low:
                break
        self.low = value
        for _ in range(4):
            self._shift()
        return bytes(self.out.rstrip(b"\0"))

    def _shift(self) -> None:
        if self.low > FULL:  # carry into what is written already
            self.low &= FULL
            place = len(self.out) - 1
            while self.out[place] == 0xFF:
                self.out[place] = 0
                place -= 1
            self.out[place] += 1
        self.out.append(self.low >> 24)
        self.low = self.low << 8 & FULL


class RangeDecoder:
    """Reads the bits that `RangeEncoder` wrote under the same probabilities."""

    __slots__ = ("at", "code", "data", "span")

    def __init__(self, data: bytes) -> None:
        if data[-1:] == b"\0":
            raise BadFile("zeros at the end of an entropy-coded stream")
        self.data, self.at, self.span = data, 4, FULL
        self.code = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def bit(self, chance: int, _: int = 0) -> int:
        """Return the next bit, whose probability of being 1 is `chance` of 65536."""
        bound = (self.span >> BITS) * chance
        if self.code < bound:
            self.span, value = bound, 1
        else:
            self.code -= bound
            self.span -= bound
            value = 0
        while self.span < LEAST:
            at = self.at
            self.code = self.code << 8 | (self.data[at] if at < len(self.data) else 0)
            self.span <<= 8
            self.at = at + 1
        return value

    def close(self) -> None:
        """Raise `BadFile` where bytes are left over."""
        if self.at < len(self.data):
            raise BadFile("bytes are left over in an entropy-coded stream")
