"""Files of version 1.3 taken apart and put together again, and random changes of files."""

from __future__ import annotations

import json
import zlib

import numpy as np

from karikomi.pack.codecs.cursor import Cursor, varint
from karikomi.pack.container.manifest import DICTIONARY


class Index:
    """A packed file taken apart: directory, manifest, checks and the payload behind them, all open to change."""

    def __init__(self, data: bytes) -> None:
        length = int.from_bytes(data[:8], "little")
        self.directory = json.loads(data[8 : 8 + length])
        self.metadata = self.directory.pop("__metadata__")
        self.body = data[8 + length :]
        cursor = Cursor(self.body[4:])
        size = cursor.varint()
        self.size_bytes = cursor.at
        inner = Cursor(cursor.take(size))
        machine = zlib.decompressobj(-15, DICTIONARY)
        self.manifest = json.loads(machine.decompress(inner.take(inner.varint())))
        self.checks = inner.rest()
        self.payload = cursor.rest()
        self.first = self.directory[""]["shape"][0] - (len(self.body) - len(self.payload))

    def text(self) -> bytes:
        """Return the manifest as JSON."""
        return json.dumps(self.manifest, separators=(",", ":"), ensure_ascii=False).encode()

    def span(self, name: str) -> tuple[int, int]:
        """Return where the payload of a tensor alone begins and ends in `payload`."""
        at, own = 0, self.first
        for row in self.manifest["g"]:
            size, names = sum(row[2:]), self.names(row)
            alone = len(names) == 1 and names[0] in self.directory
            start = own if alone else at
            if names == [name]:
                return start, start + size
            own, at = (own + size, at) if alone else (own, at + size)
        raise KeyError(name)

    def names(self, row: list) -> list[str]:
        """Return the names of a group."""
        rows = self.manifest["g"]
        first = sum(other[1] for other in rows[: rows.index(row)])
        return self.manifest["n"][first : first + row[1]]

    def build(self, payload: bytes | None = None) -> bytes:
        """Return the file; the CRC32 of every part agrees with `payload`, and the manifest's with itself."""
        if payload is not None:
            self.payload, self.checks = payload, self._sealed()
        machine = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
        text = machine.compress(self.text()) + machine.flush()
        body = varint(len(text)) + text + self.checks
        body = varint(len(body)) + body
        start = zlib.crc32(body).to_bytes(4, "little") + body
        directory = self._moved(len(start) + self.first) if "" in self.directory else self.directory
        whole = {"__metadata__": self.metadata} | directory
        header = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
        return len(header).to_bytes(8, "little") + header + start + self.payload

    def _moved(self, first: int) -> dict:
        at, found = 0, {}
        for name, item in self.directory.items():
            size = first if name == "" else item["shape"][0]
            found[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
            at += size
        return found

    def _sealed(self) -> bytes:
        cursor, out = Cursor(self.checks), b""
        for row in self.manifest["g"]:
            out += cursor.take(8)
            names = self.names(row)
            start = self._start(row, names)
            tables, *chunks = row[2:]
            for length in [tables + sum(chunks[:1]), *chunks[1:]]:
                cursor.take(4)
                out += zlib.crc32(self.payload[start : start + length]).to_bytes(4, "little")
                start += length
        return out

    def _start(self, row: list, names: list[str]) -> int:
        at, own = 0, self.first
        for other in self.manifest["g"]:
            theirs = self.names(other)
            alone = len(theirs) == 1 and theirs[0] in self.directory
            if other is row:
                return own if alone else at
            own, at = (own + sum(other[2:]), at) if alone else (own, at + sum(other[2:]))
        raise KeyError(names)


def mutated(data: bytes, generator: np.random.Generator) -> bytes:
    """Return a file with one to three random changes: bytes altered, removed, doubled or copied elsewhere."""
    bad = bytearray(data)
    for _ in range(int(generator.integers(1, 4))):
        at, other = (int(place) for place in generator.integers(0, len(bad), 2))
        length = int(generator.integers(1, 9))
        way = int(generator.integers(0, 6))
        if way < 3:
            bad[at] ^= 1 << int(generator.integers(0, 8))
        elif way == 3:
            del bad[at : at + length]
        elif way == 4:
            bad[at:at] = bad[at : at + length]
        else:
            bad[at : at + length] = bad[other : other + length]
    return bytes(bad)


def sealed(data: bytes, generator: np.random.Generator) -> bytes:
    """Return a file with changed groups, whose checksums agree: only codecs and digests can tell."""
    index = Index(data)
    payload = mutated(index.payload, generator)
    return index.build(payload[: len(index.payload)].ljust(len(index.payload), b"\0"))
