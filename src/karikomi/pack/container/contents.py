"""What a manifest says, whatever its version: groups of tensors that are coded together, each with its checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from karikomi.pack.codecs import LEVEL_CODECS, SINGLE_CODECS
from karikomi.pack.container.strict_json import (
    Version,
    listed,
    natural,
    require,
    require_known,
)
from karikomi.pack.grid_codec import GRID_CODECS, grid_numbers
from karikomi.pack.read_budget import Budget
from karikomi.pack.stored import DTYPES, code_dtype, name_fault

INTEGER_CODECS = frozenset({"bits", "rans", *LEVEL_CODECS})


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """The manifest's entry of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    grid: list | None

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def decoded_size(self) -> int:
        """Bytes of the decoded tensor and of its grid."""
        size = code_dtype(self.dtype, None).itemsize
        return self.size * size + 4 * grid_numbers(self.grid, self.shape)


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors in one payload: tables, then chunks of at most `chunk_symbols` symbols, one after the other.

    `chunks`: the bytes of each; `checks`: bytes and CRC32 of the parts that fill the payload; `digest`: of the decoded
    tensors, in hex; `start`: where the payload begins in the file.
    """

    entries: tuple[ManifestEntry, ...]
    codec: str
    tables: int
    chunks: tuple[int, ...]
    checks: tuple[tuple[int, int], ...]
    digest: str
    chunk_symbols: int
    start: int = 0

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return self.tables + sum(self.chunks)

    @property
    def symbols(self) -> int:
        """The number of elements of all tensors."""
        return sum(entry.size for entry in self.entries)

    @property
    def label(self) -> str:
        """How an error names the group."""
        names = [repr(entry.name) for entry in self.entries[:3]]
        more = ", ..." if len(self.entries) > 3 else ""
        return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names)}{more}"

    def at(self, start: int) -> TensorGroup:
        """Return the group with its place in the file."""
        return replace(self, start=start)


class Contents(NamedTuple):
    """The groups of a file, name -> name of an equal tensor, the notes, and the manifest's bytes.

    Of a delta also the digest of its base, and the names of the tensors that are differences from it.
    """

    groups: list[TensorGroup]
    equal: dict[str, str]
    notes: dict[str, str]
    manifest: int
    base: str | None = None
    differences: frozenset[str] = frozenset()


def checked_entry(
    name: Any, shape: Any, kind: Any, grid: Any, version: Version, budget: Budget, where: str
) -> ManifestEntry:
    """Return the entry of a tensor; raise `BadFile` for anything malformed."""
    fault = name_fault(name)
    require(fault is None, f"bad tensor name: {fault}", where, name)
    where = f"{where}, tensor {name!r}"
    shape = tuple(listed(shape, where))
    budget.admit("rank", len(shape), where)
    require(all(map(natural, shape)), "malformed shape", where, shape)
    budget.admit_elements(shape, where)
    good = isinstance(kind, str) and kind in DTYPES
    require_known([] if good else [kind], "unknown type", version, where)
    if grid is not None:
        good = isinstance(grid, list) and grid[:1] in [[kind] for kind in GRID_CODECS]
        require_known([] if good else [grid], "unknown quantizer", version, where)
        good = kind == "f4" and GRID_CODECS[grid[0]].is_valid(grid[1:], shape)
        require(good, "malformed quantizer", where, grid)
    return ManifestEntry(name, shape, kind, grid)


def check_codec(
    codec: Any, entries: tuple[ManifestEntry, ...], version: Version, where: str
) -> None:
    """Raise `BadFile` for a codec that is unknown, or not for these tensors."""
    good = isinstance(codec, str) and (codec in SINGLE_CODECS or codec in LEVEL_CODECS)
    require_known([] if good else [codec], "unknown codec", version, where)
    if codec in INTEGER_CODECS:
        carriers = [(e.dtype, code_dtype(e.dtype, None)) for e in entries if e.grid is None]
        wrong = [f"{codec} for {kind}" for kind, carrier in carriers if carrier.kind not in "iu"]
        require(not wrong, "the codec is for integers", where, *wrong[:1])


def check_names(
    entries: list[ManifestEntry], equal: Any, budget: Budget, where: str
) -> dict[str, str]:
    """Return name -> name of an equal tensor; raise `BadFile` for names that occur twice or lead nowhere."""
    require(isinstance(equal, Mapping), "the equal tensors are not an object", where, equal)
    budget.admit("tensors", len(entries) + len(equal), where)
    names = {entry.name for entry in entries}
    require(len(names) == len(entries), "two tensors have one name", where)
    for name, other in equal.items():
        fault = name_fault(name)
        require(fault is None, f"bad tensor name: {fault}", where, name)
        require(name not in names, "a tensor is stored, and equal to another", where, name)
        good = isinstance(other, str) and other in names
        require(good, "a tensor is equal to one that is not stored", where, other)
    return equal


def check_notes(notes: Any, where: str) -> dict[str, str]:
    """Return notes; raise `BadFile` unless they are text to text."""
    good = isinstance(notes, dict) and all(isinstance(item, str) for item in notes.values())
    require(good, "notes must be text", where)
    return notes


def check_features(features: Any, known: frozenset[str], version: Version, where: str) -> None:
    """Raise `BadFile` for a required feature that is not known."""
    worded = all(isinstance(item, str) for item in listed(features, where))
    require(worded, "features must be text", where, features)
    lacking = "the file needs features that this version lacks"
    require_known(set(features) - known, lacking, version, where, hint="upgrade karikomi")
