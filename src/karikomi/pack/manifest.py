"""The manifest: strict JSON, deflated, in base 85, under one key of the safetensors metadata.

``{"v": [major, minor], "r": [required features], "t": [tensors], "a": {name: name of an equal
tensor}, "notes": {text: text}}``; a tensor is ``{"n": name, "s": shape, "d": type, "g": grid, "c": codec,
"k": chunks, "x": digest}``. `d` is NumPy's kind and item size of the decoded tensor, or the name of a type
of ml_dtypes; `g` is absent, or a grid's kind and parameters (see `grid_codec`); `k` lists ``[bytes,
CRC32]``, first for the tables (grid, then codec), then for each chunk of 2**20 symbols; `x` is the hex
digest of the decoded bytes. `r`, `a` and `notes` are absent where empty. JSON inside of JSON would need a
backslash before each quote.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from karikomi.errors import BadFile
from karikomi.pack.contest import CHUNK, CODECS, INTEGER_CODECS
from karikomi.pack.grid_codec import GRID_CODECS, grid_numbers
from karikomi.pack.read_budget import Budget
from karikomi.pack.stored import DIGEST_BYTES, DTYPES, EXTENDED, code_dtype, name_fault

VERSION = (1, 3)
"""The latest version that is read; what is written is the lowest that has all that a file contains."""
FEATURES: frozenset[str] = frozenset()
KEYS = {"v", "r", "t", "a", "notes"}
ENTRY_KEYS = set("nsdgckx")

Version = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """The manifest's entry of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    grid: list | None
    codec: str
    chunks: tuple[tuple[int, int], ...]
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Return the entry in the manifest's short keys."""
        entry = {"n": self.name, "s": self.shape, "d": self.dtype, "g": self.grid}
        entry |= {"c": self.codec, "k": self.chunks, "x": self.digest}
        return {key: value for key, value in entry.items() if value is not None}

    @property
    def size(self) -> int:
        """Bytes of the whole payload."""
        return sum(length for length, _ in self.chunks)

    @property
    def decoded_size(self) -> int:
        """Bytes of the decoded tensor and of its grid."""
        size = code_dtype(self.dtype, None).itemsize
        return math.prod(self.shape) * size + 4 * grid_numbers(self.grid, self.shape)


def version_of(entries: list[ManifestEntry], equal: Mapping[str, str]) -> Version:
    """Return the lowest version of the format that has the grids and types of these tensors, and equal ones."""
    specs = [entry.grid for entry in entries if entry.grid]
    minors = [GRID_CODECS[spec[0]].minor_version(spec[1:]) for spec in specs]
    minors += [2 for entry in entries if entry.dtype in EXTENDED]
    return VERSION[0], max([*minors, 2 if equal else 0])


def dump(entries: list[ManifestEntry], equal: Mapping[str, str], notes: Mapping[str, str]) -> str:
    """Return the manifest as the text of the metadata."""
    version, tensors = version_of(entries, equal), [entry.to_json() for entry in entries]
    whole: dict[str, Any] = {"v": version, "t": tensors}
    if equal:
        whole["a"] = dict(equal)
    if notes:
        whole["notes"] = dict(sorted(notes.items()))
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False)
    return base64.b85encode(zlib.compress(text.encode("utf-8"), 9)).decode("ascii")


def load(
    text: str, version: Version, budget: Budget, where: str
) -> tuple[list[ManifestEntry], dict[str, str], dict[str, str]]:
    """Return the tensors, name -> name of an equal one, and the notes; raise `BadFile` for anything malformed.

    `version` is that of the header.
    """
    whole = parse_json(_expand(text, budget, where), where)
    if not isinstance(whole, dict) or not isinstance(whole.get("v"), list):
        raise BadFile("the manifest has no version", where=where)
    same = check_version(whole["v"], where) == version
    require(same, "header and manifest state different versions", where, whole["v"])
    require_known(set(whole) - KEYS, "unknown fields in the manifest", version, where)
    features, tensors, notes = whole.get("r", []), whole.get("t"), whole.get("notes", {})
    worded = all(isinstance(item, str) for item in _list(features, where))
    require(worded, "features must be text", where, features)
    unknown = set(features) - FEATURES
    lacking = "the file needs features that this version lacks"
    require_known(unknown, lacking, version, where, hint="upgrade karikomi")
    equal = whole.get("a", {})
    require(isinstance(equal, dict), "the equal tensors are not an object", where, equal)
    budget.admit("tensors", len(_list(tensors, where)) + len(equal), where)
    if not isinstance(notes, dict) or not all(isinstance(item, str) for item in notes.values()):
        raise BadFile("notes must be text", where=where)
    entries = [_entry(item, version, budget, where) for item in _list(tensors, where)]
    _check_equal(equal, {entry.name for entry in entries}, where)
    lacking = "a grid, a type or equal tensors of a later version"
    require(version_of(entries, equal) <= version, lacking, where, list(version))
    return entries, equal, notes


def parse_json(data: bytes, where: str) -> Any:
    """Return JSON of objects, lists, text and integers; duplicate keys and floats are refused."""
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_refuse,
        )
    except (ValueError, RecursionError) as error:
        raise BadFile(f"malformed JSON ({str(error)[:80]})", where=where) from error


def check_version(version: list, where: str) -> Version:
    """Return a version, or raise `BadFile` for a major one that is not this one."""
    require(len(version) == 2 and all(map(_natural, version)), "malformed version", where, version)
    if version[0] != VERSION[0]:
        raise BadFile(
            "the file has another major version",
            where=where,
            got=str(version[0])[:80],
            allowed=VERSION[0],
            hint="upgrade karikomi",
        )
    return version[0], version[1]


def require_known(
    unknown: Collection[Any], fact: str, version: Version, where: str, hint: str | None = None
) -> None:
    """Raise `BadFile` with `fact` where anything is unknown; a later minor version may define it."""
    if not unknown:
        return
    if version > VERSION:
        fact = f"the file is from a later version, {version[0]}.{version[1]}: {fact}"
        hint = "upgrade karikomi"
    got = sorted(map(repr, unknown))[:5]
    raise BadFile(fact, where=where, got=", ".join(got)[:80], hint=hint)


def require(truth: bool, fact: str, where: str, got: object = None) -> None:
    """Raise `BadFile` with `fact` unless `truth`."""
    if not truth:
        raise BadFile(fact, where=where, got=None if got is None else repr(got)[:80])


def _check_equal(equal: dict[str, Any], names: set[str], where: str) -> None:
    for name, other in equal.items():
        fault = name_fault(name)
        require(fault is None, f"bad tensor name: {fault}", where, name)
        require(name not in names, "a tensor is stored, and equal to another", where, name)
        good = isinstance(other, str) and other in names
        require(good, "a tensor is equal to one that is not stored", where, other)


def _entry(item: Any, version: Version, budget: Budget, where: str) -> ManifestEntry:
    require(isinstance(item, dict), "a tensor's entry is not an object", where)
    fault = name_fault(item.get("n"))
    require(fault is None, f"bad tensor name: {fault}", where, item.get("n"))
    where = f"{where}, tensor {item['n']!r}"
    require_known(set(item) - ENTRY_KEYS, "unknown fields", version, where)
    require(set(item) | {"g"} == ENTRY_KEYS, "missing fields", where, sorted(item))
    shape = tuple(_list(item["s"], where))
    budget.admit("rank", len(shape), where)
    require(all(map(_natural, shape)), "malformed shape", where, shape)
    budget.admit_elements(shape, where)
    dtype, codec, grid = item["d"], item["c"], item.get("g")
    good = isinstance(dtype, str) and dtype in DTYPES
    require_known([] if good else [dtype], "unknown type", version, where)
    good = isinstance(codec, str) and codec in CODECS
    require_known([] if good else [codec], "unknown codec", version, where)
    chunks = tuple(tuple(_list(pair, where)) for pair in _list(item["k"], where))
    require(
        len(chunks) == 1 - -math.prod(shape) // CHUNK, "wrong number of chunks", where, len(chunks)
    )
    require(
        all(len(pair) == 2 and all(map(_natural, pair)) for pair in chunks),
        "malformed chunk table",
        where,
    )
    require(
        isinstance(item["x"], str) and len(item["x"]) == 2 * DIGEST_BYTES, "malformed digest", where
    )
    if grid is not None:
        good = isinstance(grid, list) and grid[:1] in [[kind] for kind in GRID_CODECS]
        require_known([] if good else [grid], "unknown quantizer", version, where)
        good = dtype == "f4" and GRID_CODECS[grid[0]].is_valid(grid[1:], shape)
        require(good, "malformed quantizer", where, grid)
    elif codec in INTEGER_CODECS:
        integers = code_dtype(dtype, None).kind in "iu"
        require(integers, "the codec is for integers", where, f"{codec} for {dtype}")
    return ManifestEntry(item["n"], shape, dtype, grid, codec, chunks, item["x"])


def _expand(text: str, budget: Budget, where: str) -> bytes:
    try:
        machine = zlib.decompressobj()
        data = machine.decompress(base64.b85decode(text), budget.header + 1)
    except (ValueError, zlib.error) as error:
        raise BadFile("the manifest is damaged", where=where) from error
    budget.admit("header", len(data), where)
    require(machine.eof and not machine.unused_data, "the manifest is damaged", where)
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _refuse(token: str) -> Any:
    raise ValueError(f"the number {token[:20]} is not an integer")


def _natural(value: object) -> bool:
    return type(value) is int and value >= 0


def _list(value: Any, where: str) -> list:
    require(isinstance(value, list), "a list is missing in the manifest", where)
    return value
