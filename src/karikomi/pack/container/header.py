"""The safetensors header: written by the format's rules, read more strictly than they require.

Eight bytes with the length, JSON, then the payloads without a hole: each tensor one U8 array.
Refused beside what safetensors refuses: duplicate keys, bad names, other types or ranks.
"""

from __future__ import annotations

import json
from typing import Any, BinaryIO, NamedTuple, TypeGuard

from karikomi.errors import BadFile
from karikomi.pack.container.strict_json import (
    Version,
    check_version,
    parse_json,
    require,
    require_known,
)
from karikomi.pack.read_budget import Budget

LENGTH_BYTES = 8
MOST_HEADER = 100_000_000
"""Bytes of the longest header that safetensors writes: more is no length, but text."""
OTHER_KIND = "this is neither a .karikomi nor a safetensors file"
METADATA, VERSION_KEY, MANIFEST_KEY = "__metadata__", "karikomi", "manifest"
FIRST_INDEX = (1, 3)
"""The first version that has its manifest in a payload, and not in the metadata."""


class Header(NamedTuple):
    """The span of each payload from the start of the file, the manifest's text in files up to 1.2, and the version."""

    spans: dict[str, tuple[int, int]]
    manifest: str | None
    version: Version
    size: int


def dump(sizes: dict[str, int], version: Version) -> bytes:
    """Return the header for payloads of these sizes, one after the other."""
    whole: dict[str, Any] = {METADATA: {VERSION_KEY: ".".join(map(str, version))}}
    at = 0
    for name, size in sizes.items():
        whole[name] = directory_entry(at, at + size)
        at += size
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def directory_entry(start: int, end: int) -> dict[str, Any]:
    """Return the directory entry of one payload."""
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}


def read(stream: BinaryIO, file_size: int, budget: Budget, where: str) -> Header:
    """Return the header of an open file of `file_size` bytes; raise `BadFile` for a bad one."""
    whole, start = read_json(stream, file_size, budget, where, blanks=False)
    version, manifest = _manifest(whole.pop(METADATA, None), where)
    budget.admit("tensors", len(whole), where)
    spans = {name: _span(name, item, start, where) for name, item in whole.items()}
    require_tiling(spans, start, file_size, where)
    return Header(spans, manifest, version, start)


def read_json(
    stream: BinaryIO, file_size: int, budget: Budget, where: str, *, blanks: bool = True
) -> tuple[dict[str, Any], int]:
    """Return the header of any safetensors file as JSON, and its end; raise `BadFile`.

    `blanks`: whether it may begin with white space, as safetensors itself allows.
    """
    prefix = stream.read(LENGTH_BYTES)
    require(len(prefix) == LENGTH_BYTES, "the file is cut short in its first eight bytes", where)
    length = int.from_bytes(prefix, "little")
    if length > file_size - LENGTH_BYTES:
        require(length <= MOST_HEADER and stream.read(1) == b"{", OTHER_KIND, where)
        require(False, "the header ends beyond the file", where, length)
    budget.admit("header", length, where)
    text = stream.read(length)
    begin = text.lstrip(b" \t\r\n") if blanks else text
    require(len(text) == length and begin[:1] == b"{", OTHER_KIND, where)
    return parse_json(text, where), LENGTH_BYTES + length


def _manifest(metadata: Any, where: str) -> tuple[Version, str | None]:
    if not isinstance(metadata, dict) or VERSION_KEY not in metadata:
        raise BadFile(
            "a safetensors file, but not a packed one",
            where=where,
            hint="pack it first: karikomi pack",
        )
    text = metadata[VERSION_KEY]
    require(isinstance(text, str) and text.isascii(), "malformed version", where, text)
    numbers = [int(part) if part.isdigit() and len(part) < 9 else -1 for part in text.split(".")]
    version = check_version(numbers, where)
    unknown = set(metadata) - {VERSION_KEY, MANIFEST_KEY}
    require_known(unknown, "unknown metadata", version, where)
    manifest = metadata.get(MANIFEST_KEY)
    absent = MANIFEST_KEY not in metadata and version >= FIRST_INDEX
    require(absent or isinstance(manifest, str), "the manifest is not text", where)
    return version, manifest


def _span(name: str, item: Any, start: int, where: str) -> tuple[int, int]:
    offsets: Any = item.get("data_offsets") if isinstance(item, dict) else None
    # The type as well, since equality alone would take true for 1.
    same = ascending(offsets) and item == directory_entry(*offsets)
    if not same or type(item["shape"][0]) is not int:
        raise BadFile(
            "malformed directory entry", where=f"{where}, tensor {name[:80]!r}", got=repr(item)[:80]
        )
    return start + offsets[0], start + offsets[1]


def ascending(offsets: Any) -> TypeGuard[list[int]]:
    """Return whether these are offsets: two whole numbers, the first not above the second."""
    good = isinstance(offsets, list) and len(offsets) == 2
    return good and all(type(at) is int for at in offsets) and 0 <= offsets[0] <= offsets[1]


def require_tiling(
    spans: dict[str, tuple[int, int]], start: int, file_size: int, where: str
) -> None:
    """Raise `BadFile` unless the payloads are contiguous up to the end of the file."""
    at = start
    for name, (first, last) in sorted(spans.items(), key=lambda pair: pair[1]):
        place = f"{where}, tensor {name[:80]!r}"
        require(first == at, "payloads overlap or leave a hole", place, [first - start, at - start])
        require(last <= file_size, "the payload ends beyond the file", place, last - start)
        at = last
    require(at == file_size, "bytes follow the last payload", where, file_size - at)
