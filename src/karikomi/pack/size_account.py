"""The size of a packed file by tensor and part, beside the Shannon bound."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from karikomi.pack import header
from karikomi.pack.contest import shannon
from karikomi.pack.grid_codec import GRID_CODECS
from karikomi.pack.manifest import ManifestEntry
from karikomi.pack.read_budget import Budget
from karikomi.pack.reader import Opened, opened
from karikomi.pack.stored import DTYPES, Stored


@dataclass(frozen=True, slots=True)
class SizeAccount:
    """The bytes of one tensor.

    `payload` codes the weights, `tables` holds scales or codebook and the codec's model, `header`
    is its part of the safetensors directory, `manifest` its share of the manifest; `dense` is the
    size of the decoded tensor. `shannon` is the order-0 bound in bytes for its codes (for floats:
    for each byte plane). `bits_per_weight` counts payload and tables. A tensor that equals another one
    (tied weights) has the codec ``= other`` and no bytes, of file or decoded tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    quantizer: str
    codec: str
    elements: int
    nonzero: int
    dense: int
    payload: int
    tables: int
    header: int
    manifest: int
    shannon: float

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of payload and tables per element; 0 for a tensor without elements."""
        return 8 * (self.payload + self.tables) / self.elements if self.elements else 0.0


@dataclass(frozen=True, slots=True)
class Inspection:
    """The accounts of all tensors and the totals: payload, tables, header, manifest, their sum.

    `header` counts the directory, the eight bytes of its length and the punctuation around it.
    """

    entries: tuple[SizeAccount, ...]
    notes: dict[str, str]
    payload: int
    tables: int
    header: int
    manifest: int
    total: int

    @property
    def dense(self) -> int:
        """Bytes of all decoded tensors."""
        return sum(entry.dense for entry in self.entries)

    @property
    def ratio(self) -> float:
        """Decoded bytes per byte of file."""
        return self.dense / self.total


def inspect(path: str | os.PathLike[str], *, budget: Budget | None = None) -> Inspection:
    """Read and verify a packed file and return the size of each tensor.

    Raises `BadFile` as `load` does.

    >>> import tempfile
    >>> from karikomi.pack import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     seen = inspect(save({"x": np.zeros((10, 10), np.int8)}, folder + "/x.karikomi"))
    >>> seen.entries[0].codec, seen.entries[0].payload, seen.payload + seen.tables
    ('bits', 0, 2)
    """
    with opened(path, budget) as file:
        shares = _manifest_shares(file)
        accounts = tuple(
            _account(entry, stored, file, share)
            for share, (entry, stored) in zip(shares, file.tensors(), strict=True)
        )
        accounts += tuple(_equal(name, accounts, other) for name, other in file.equal.items())
        manifest = len(file.header.manifest)
        return Inspection(
            entries=accounts,
            notes=file.notes,
            payload=sum(account.payload for account in accounts),
            tables=sum(account.tables for account in accounts),
            header=file.header.size - manifest,
            manifest=manifest,
            total=file.size,
        )


def _account(entry: ManifestEntry, stored: Stored, file: Opened, manifest: int) -> SizeAccount:
    value = stored.decoded()
    return SizeAccount(
        name=entry.name,
        shape=entry.shape,
        dtype=entry.dtype,
        quantizer=GRID_CODECS[entry.grid[0]].text(entry.grid[1:]) if entry.grid else "none",
        codec=entry.codec,
        elements=math.prod(entry.shape),
        nonzero=int(np.count_nonzero(value)),
        dense=-(-value.size * (32 if entry.grid else DTYPES[entry.dtype].bits) // 8),
        payload=entry.size - entry.chunks[0][0],
        tables=entry.chunks[0][0],
        header=_directory_bytes(entry.name, file),
        manifest=manifest,
        shannon=shannon(stored),
    )


def _equal(name: str, accounts: Sequence[SizeAccount], other: str) -> SizeAccount:
    """Return the account of a tensor that is stored as another: it takes no bytes, in the file and before."""
    like = next(account for account in accounts if account.name == other)
    none = {"dense": 0, "payload": 0, "tables": 0, "header": 0, "manifest": 0, "shannon": 0.0}
    return replace(like, name=name, codec=f"= {other}", **none)


def _directory_bytes(name: str, file: Opened) -> int:
    start, end = (at - file.header.size for at in file.header.spans[name])
    text = json.dumps(
        {name: header.directory_entry(start, end)}, separators=(",", ":"), ensure_ascii=False
    )
    return len(text.encode("utf-8")) - 1


def _manifest_shares(file: Opened) -> list[int]:
    # The manifest is deflated as a whole: its bytes are shared out by the length of the entries.
    lengths = np.array([len(json.dumps(entry.to_json())) for entry in file.entries], dtype=float)
    ends = np.rint(np.cumsum(lengths) / max(lengths.sum(), 1.0) * len(file.header.manifest))
    return np.diff(ends, prepend=0).astype(int).tolist()
