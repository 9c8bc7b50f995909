"""Raw deflate streams, with output that cannot outgrow what was announced.

zlib writes them, so that the bytes are the same everywhere. ISA-L reads them where the package ``isal`` is installed
(the extra ``fast``): Huffman-coded planes four times as fast as zlib; where it is not, zlib does.
"""

from __future__ import annotations

import zlib
from types import ModuleType

from karikomi.errors import BadFile


def _inflater() -> ModuleType:
    try:
        from isal import isal_zlib
    except ImportError:
        return zlib
    return isal_zlib


inflater = _inflater()
"""The module that reads: zlib, or one with its interface."""

THOROUGH_UP_TO = 2**17
HUFFMAN, MATCHES = zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY


def squeeze(data: bytes, strategy: int) -> bytes:
    """Return a raw deflate stream: `HUFFMAN` codes bytes one by one, `MATCHES` also repeats."""
    # Raw (-15): the wrapper and its checksum would cost six bytes, and each chunk has a CRC32.
    # Memory level 9 gives the longest blocks, hence the fewest Huffman tables.
    # The thorough search takes five times as long on long runs of zeros, where `gaps` wins anyway.
    level = 9 if len(data) <= THOROUGH_UP_TO else 6
    machine = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
    return machine.compress(data) + machine.flush()


def expand(data: bytes, size: int) -> bytes:
    """Return exactly `size` bytes from a raw deflate stream; raise `BadFile` for anything else."""
    machine = inflater.decompressobj(-15)
    try:
        out = machine.decompress(data, size + 1)
    except inflater.error as error:
        raise BadFile("a deflate stream is damaged") from error
    if len(out) != size or not machine.eof:
        raise BadFile("a deflate stream has the wrong length", allowed=f"{size} bytes")
    if machine.unused_data:
        raise BadFile("bytes follow a deflate stream", got=len(machine.unused_data))
    return out


def crc32(data: bytes) -> int:
    """Return the CRC-32 of zlib and PNG.

    >>> crc32(b"123456789") == 0xCBF43926
    True
    """
    return inflater.crc32(data)
