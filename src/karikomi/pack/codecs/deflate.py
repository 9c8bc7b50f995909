"""Raw deflate streams by zlib, with output that cannot outgrow what was announced."""

from __future__ import annotations

import zlib

from karikomi.errors import BadFile

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
    machine = zlib.decompressobj(-15)
    try:
        out = machine.decompress(data, size + 1)
    except zlib.error as error:
        raise BadFile("a deflate stream is damaged") from error
    if len(out) != size or not machine.eof:
        raise BadFile("a deflate stream has the wrong length", allowed=f"{size} bytes")
    if machine.unused_data:
        raise BadFile("bytes follow a deflate stream", got=len(machine.unused_data))
    return out
