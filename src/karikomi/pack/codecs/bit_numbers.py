"""Numbers of any width one after the other, highest bit first, and short lists of small signed ones."""

from __future__ import annotations

from collections.abc import Iterable

from karikomi.errors import BadFile

RICE_BITS = 3
"""Bits that state the width of the low part of each number of a list, 0 to 7."""


class BitWriter:
    """Collects bits."""

    __slots__ = ("parts",)

    def __init__(self) -> None:
        self.parts: list[str] = []

    def number(self, value: int, bits: int) -> None:
        """Append `value` in `bits` bits, at least one."""
        self.parts.append(f"{value:0{bits}b}")

    def signed(self, values: Iterable[int]) -> None:
        """Append small signed integers as Rice codes: multiples of ``2**width`` in unary, the rest in `width` bits."""
        folded = [2 * value if value >= 0 else -2 * value - 1 for value in values]
        width = min(
            range(1 << RICE_BITS), key=lambda k: sum(n >> k for n in folded) + k * len(folded)
        )
        self.number(width, RICE_BITS)
        for value in folded:
            self.parts.append("1" * (value >> width) + "0")
            if width:
                self.number(value & (1 << width) - 1, width)

    def close(self) -> bytes:
        """Return the bits, filled up with zeros to a whole byte."""
        text = "".join(self.parts)
        text += "0" * (-len(text) % 8)
        return int(text or "0", 2).to_bytes(len(text) // 8, "big")


class BitReader:
    """A position in bits; every read is checked and raises `BadFile` at the end."""

    __slots__ = ("at", "text")

    def __init__(self, data: bytes) -> None:
        self.text = f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}" if data else ""
        self.at = 0

    def number(self, bits: int) -> int:
        """Return the next number of `bits` bits."""
        if self.at + bits > len(self.text):
            raise BadFile("the payload ends too early")
        self.at += bits
        return int(self.text[self.at - bits : self.at] or "0", 2)

    def signed(self, count: int) -> list[int]:
        """Return `count` integers written by `BitWriter.signed`."""
        width, found = self.number(RICE_BITS), []
        for _ in range(count):
            end = self.text.find("0", self.at)
            if end < 0:
                raise BadFile("the payload ends too early")
            high, self.at = end - self.at, end + 1
            folded = high << width | self.number(width)
            found.append(-(folded >> 1) - 1 if folded & 1 else folded >> 1)
        return found

    def close(self) -> None:
        """Raise `BadFile` where more than the fill of the last byte is left, or it is not zero."""
        if len(self.text) - self.at >= 8 or "1" in self.text[self.at :]:
            raise BadFile("bits are left over in the payload")
