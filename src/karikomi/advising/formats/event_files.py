"""TensorBoard event files: frames with CRC-32C, a few fields of three protocol buffers; no TensorFlow, no protobuf.

A frame is the length (8 bytes), its masked CRC, the data, and their masked CRC. A file that ends within a frame, or
whose frames cannot be found any more, is read up to there; a frame with altered data is left out. Both are named.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from karikomi.advising.formats.keyed import LoggedCurves
from karikomi.errors import BadFile

FORMAT = "TensorBoard event files"
SCALAR_MOST = 4096
"""Frames of more bytes hold histograms, images or graphs, and no scalars: they are passed over."""

_DELTA = 0xA282EAD8
_FLOAT, _DOUBLE = 1, 2


def _crc_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


_TABLE = _crc_table()


def masked_crcs(frames: np.ndarray) -> np.ndarray:
    """Return the masked CRC-32C of frames of one length, shape (n, length), uint8; all at once.

    >>> hex(int(masked_crcs(np.frombuffer(b"123456789", np.uint8)[None])[0]))
    '0xc78ab0e5'
    """
    crc = np.full(len(frames), 0xFFFFFFFF, np.uint32)
    for column in frames.T:
        crc = _TABLE[(crc ^ column) & 0xFF] ^ (crc >> np.uint32(8))
    crc = (~crc).astype(np.uint64)
    return (((crc >> np.uint64(15)) | (crc << np.uint64(17))) + np.uint64(_DELTA)) & np.uint64(
        0xFFFFFFFF
    )


def is_event_file(path: Path) -> bool:
    """Return whether a file begins with a frame."""
    try:
        with path.open("rb") as stream:
            head = stream.read(12)
    except OSError:
        return False
    return len(head) == 12 and _length_is_good(head)


def read_event_files(paths: list[Path]) -> tuple[LoggedCurves, list[str]]:
    """Return the scalars of the files of one run in the order given, and what was lost; raises `BadFile`."""
    curves, lost = LoggedCurves(), []
    for path in paths:
        frames, found = _frames(path)
        lost += found
        for frame in frames:
            try:
                for tag, step, value in _scalars(memoryview(frame)):
                    curves.add(tag, step, value)
            except _Torn:
                lost.append(f"{path.name}: a frame that is no event")
    return curves, lost


def _frames(path: Path) -> tuple[list[bytes], list[str]]:
    """Return the data of all good small frames of a file in order, and what was lost."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            frames, torn = _split(stream, size)
    except OSError as error:
        raise BadFile("cannot read the file", where=str(path), got=error.strerror) from error
    if not frames and torn:
        raise BadFile("not an event file of TensorBoard", where=str(path), got=torn)
    good = _checked(frames)
    altered = int(len(good) - good.sum())
    lost = [f"{path.name}: {torn}"] if torn else []
    lost += [f"{path.name}: {altered:,} frames whose checksum is wrong"] if altered else []
    return [data for (data, _), right in zip(frames, good, strict=True) if right], lost


def _split(stream: BinaryIO, size: int) -> tuple[list[tuple[bytes, int]], str]:
    frames, place = [], 0
    while place < size:
        head = stream.read(12)
        if len(head) < 12:
            return frames, f"it ends within a frame after {len(frames):,} of them"
        if not _length_is_good(head):
            return frames, f"no frame begins after {len(frames):,} of them; the rest is lost"
        (length,) = struct.unpack("<Q", head[:8])
        place += 16 + length
        if place > size:
            return frames, f"it ends within a frame after {len(frames):,} of them"
        if length > SCALAR_MOST:
            stream.seek(length + 4, 1)
            continue
        data, tail = stream.read(length), stream.read(4)
        if len(data) < length or len(tail) < 4:
            return frames, f"it ends within a frame after {len(frames):,} of them"
        frames.append((data, int.from_bytes(tail, "little")))
    return frames, ""


def _length_is_good(head: bytes) -> bool:
    crc = masked_crcs(np.frombuffer(head[:8], np.uint8)[None])[0]
    return int(crc) == int.from_bytes(head[8:12], "little")


def _checked(frames: list[tuple[bytes, int]]) -> np.ndarray:
    """Return whether the checksum of each frame is right; those of one length are computed together."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, (data, _) in enumerate(frames):
        groups[len(data)].append(place)
    good = np.ones(len(frames), dtype=bool)
    for length, places in groups.items():
        joined = b"".join(frames[place][0] for place in places)
        found = masked_crcs(np.frombuffer(joined, np.uint8).reshape(len(places), length))
        good[places] = found == np.array([frames[place][1] for place in places], np.uint64)
    return good


class _Torn(Exception):
    """The bytes are no message."""


def _fields(data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yield number, wire type and value of the fields of a message."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, wire, value
            continue
        if wire == 2:
            length, place = _varint(data, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise _Torn
        if place + length > len(data):
            raise _Torn
        yield number, wire, data[place : place + length]
        place += length


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise _Torn
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise _Torn


def _scalars(event: memoryview) -> Iterator[tuple[str, int, float]]:
    """Yield tag, step and value of the scalars of an event."""
    step, summaries = 0, []
    for number, wire, value in _fields(event):
        if number == 2 and wire == 0:
            assert isinstance(value, int)  # noqa: S101  (a varint)
            step = value if value < 1 << 63 else value - (1 << 64)
        elif number == 5 and wire == 2:
            summaries.append(value)
    for summary in summaries:
        for number, wire, value in _fields(summary):
            if number == 1 and wire == 2 and isinstance(value, memoryview):
                scalar = _value(value)
                if scalar is not None:
                    yield scalar[0], step, scalar[1]


def _value(data: memoryview) -> tuple[str, float] | None:
    tag, found = "", None
    for number, wire, value in _fields(data):
        if not isinstance(value, memoryview):
            continue
        if number == 1 and wire == 2:
            tag = bytes(value).decode("utf-8", "replace")
        elif number == 2 and wire == 5:
            found = struct.unpack("<f", value)[0]
        elif number == 8 and wire == 2:
            found = _tensor(value)
    return None if found is None else (tag, found)


def _tensor(data: memoryview) -> float | None:
    """Return the number in a tensor without dimensions, of float32 or float64; ``None`` for others."""
    kind, content = 0, b""
    for number, wire, value in _fields(data):
        if number == 1 and wire == 0 and isinstance(value, int):
            kind = value
        elif number in (4, 5, 6) and isinstance(value, memoryview):
            content = bytes(value)
    if kind == _FLOAT and len(content) == 4:
        return struct.unpack("<f", content)[0]
    if kind == _DOUBLE and len(content) == 8:
        return struct.unpack("<d", content)[0]
    return None
