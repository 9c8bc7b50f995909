"""The manifest of the versions 1.0 to 1.2, read only: strict JSON, deflated, in base 85, in the safetensors metadata.

``{"v": [major, minor], "r": [required features], "t": [tensors], "a": {name: name of an equal
tensor}, "notes": {text: text}}``; a tensor is ``{"n": name, "s": shape, "d": type, "g": grid, "c": codec,
"k": chunks, "x": digest}``. `k` lists ``[bytes, CRC32]``, first for the tables (grid, then codec), then for each chunk
of 2**20 symbols. Each tensor is a group of its own, and stands in the directory.
"""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

from karikomi.errors import BadFile
from karikomi.pack.codecs import SINGLE_CODECS
from karikomi.pack.container.contents import (
    Contents,
    ManifestEntry,
    TensorGroup,
    check_codec,
    check_features,
    check_names,
    check_notes,
    checked_entry,
)
from karikomi.pack.container.header import Header
from karikomi.pack.container.strict_json import (
    Version,
    check_version,
    listed,
    natural,
    parse_json,
    require,
    require_known,
)
from karikomi.pack.grid_codec import GRID_CODECS
from karikomi.pack.read_budget import Budget
from karikomi.pack.stored import EXTENDED

CHUNK_SYMBOLS = 2**20
DIGEST_BYTES = 16
KEYS = {"v", "r", "t", "a", "notes"}
ENTRY_KEYS = set("nsdgckx")


def load(text: str, head: Header, budget: Budget, where: str) -> Contents:
    """Return what the manifest says; raise `BadFile` for anything malformed."""
    version = head.version
    whole = parse_json(_expand(text, budget, where), where)
    if not isinstance(whole, dict) or not isinstance(whole.get("v"), list):
        raise BadFile("the manifest has no version", where=where)
    same = check_version(whole["v"], where) == version
    require(same, "header and manifest state different versions", where, whole["v"])
    require_known(set(whole) - KEYS, "unknown fields in the manifest", version, where)
    check_features(whole.get("r", []), frozenset(), version, where)
    tensors = listed(whole.get("t"), where)
    budget.admit("tensors", len(tensors), where)
    notes = check_notes(whole.get("notes", {}), where)
    groups = [_group(item, version, budget, where) for item in tensors]
    entries = [group.entries[0] for group in groups]
    _require_agreement(entries, head, where)
    equal = check_names(entries, whole.get("a", {}), budget, where)
    lacking = "a grid, a type or equal tensors of a later version"
    require(_version_of(entries, equal) <= version, lacking, where, list(version))
    groups = [_placed(group, *head.spans[group.entries[0].name], where) for group in groups]
    return Contents(groups, equal, notes, len(text))


def _version_of(entries: list[ManifestEntry], equal: dict[str, str]) -> Version:
    """Return the lowest version of the format that has the grids and types of these tensors, and equal ones."""
    specs = [entry.grid for entry in entries if entry.grid]
    minors = [GRID_CODECS[spec[0]].minor_version(spec[1:]) for spec in specs]
    minors += [2 for entry in entries if entry.dtype in EXTENDED]
    return 1, max([*minors, 2 if equal else 0])


def _require_agreement(entries: list[ManifestEntry], head: Header, where: str) -> None:
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names) or set(names) != set(head.spans):
        raise BadFile("manifest and directory name different tensors", where=where)


def _placed(group: TensorGroup, start: int, end: int, where: str) -> TensorGroup:
    if group.size != end - start:
        raise BadFile(
            "the chunks do not fill the payload",
            where=f"{where}, tensor {group.entries[0].name!r}",
            got=group.size,
            allowed=end - start,
        )
    return group.at(start)


def _group(item: Any, version: Version, budget: Budget, where: str) -> TensorGroup:
    require(isinstance(item, dict), "a tensor's entry is not an object", where)
    known = item.keys() & ENTRY_KEYS | {"g"} == ENTRY_KEYS
    entry = checked_entry(
        item.get("n"), item.get("s"), item.get("d"), item.get("g"), version, budget, where
    )
    where = f"{where}, tensor {entry.name!r}"
    require_known(set(item) - ENTRY_KEYS, "unknown fields", version, where)
    require(known, "missing fields", where, sorted(item))
    codec = item["c"]
    require_known([] if codec in [*SINGLE_CODECS] else [codec], "unknown codec", version, where)
    check_codec(codec, (entry,), version, where)
    checks = tuple(tuple(listed(pair, where)) for pair in listed(item["k"], where))
    count = 1 - -math.prod(entry.shape) // CHUNK_SYMBOLS
    require(len(checks) == count, "wrong number of chunks", where, len(checks))
    good = all(len(pair) == 2 and all(map(natural, pair)) for pair in checks)
    require(good, "malformed chunk table", where)
    good = isinstance(item["x"], str) and len(item["x"]) == 2 * DIGEST_BYTES
    require(good, "malformed digest", where)
    tables, *chunks = (length for length, _ in checks)
    return TensorGroup((entry,), codec, tables, tuple(chunks), checks, item["x"], CHUNK_SYMBOLS)


def _expand(text: str, budget: Budget, where: str) -> bytes:
    try:
        machine = zlib.decompressobj()
        data = machine.decompress(base64.b85decode(text), budget.header + 1)
    except (ValueError, zlib.error) as error:
        raise BadFile("the manifest is damaged", where=where) from error
    budget.admit("header", len(data), where)
    require(machine.eof and not machine.unused_data, "the manifest is damaged", where)
    return data
