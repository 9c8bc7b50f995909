"""The size of a packed file by tensor and part, beside the Shannon bound."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from karikomi.pack.codecs import gaps
from karikomi.pack.codecs.cursor import Cursor
from karikomi.pack.container import header
from karikomi.pack.container.contents import TensorGroup
from karikomi.pack.grid_codec import GRID_CODECS
from karikomi.pack.groups.coding import Decoded, written_grids
from karikomi.pack.groups.contest import shannon
from karikomi.pack.read_budget import Budget
from karikomi.pack.reader import Opened, opened
from karikomi.pack.stored import DTYPES

NONE = "none"


@dataclass(frozen=True, slots=True)
class SizeAccount:
    """The bytes of one tensor.

    `payload` codes the weights, and `indices` is the part of it that tells where non-zeros are, in a codec that
    stores them apart; `tables` holds scales or codebook and the codec's model, and `scales` is the part of it that is
    scales or codebook; `header` is its part of the safetensors directory, `manifest` its share of the manifest. Where
    tensors are coded together, payload and tables are shared out by their bounds. `dense` is the size of the decoded
    tensor. `shannon` is the order-0 bound in bytes for its codes (for floats: for each byte plane).
    `bits_per_weight` counts payload and tables. A tensor that equals another one (tied weights) has the codec
    ``= other`` and no bytes, of file or decoded tensor.
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
    scales: int
    indices: int
    shannon: float

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of payload and tables per element; 0 for a tensor without elements."""
        return 8 * (self.payload + self.tables) / self.elements if self.elements else 0.0


@dataclass(frozen=True, slots=True)
class Inspection:
    """The accounts of all tensors and the totals: payload, tables, header, manifest, their sum.

    `header` counts the directory, the eight bytes of its length and the punctuation around it; `manifest` also the
    checksums and digests. `scales` is part of `tables`, `indices` of `payload`; `left_over` is the payload of tensors
    that are not quantized, and `shannon` the sum of the bounds.
    """

    entries: tuple[SizeAccount, ...]
    notes: dict[str, str]
    payload: int
    tables: int
    header: int
    manifest: int
    total: int

    @property
    def scales(self) -> int:
        """Bytes of scales and codebooks."""
        return sum(entry.scales for entry in self.entries)

    @property
    def indices(self) -> int:
        """Bytes that tell where non-zeros are, where a codec stores them apart."""
        return sum(entry.indices for entry in self.entries)

    @property
    def left_over(self) -> int:
        """Bytes of the payload of tensors that are not quantized."""
        return sum(entry.payload for entry in self.entries if entry.quantizer == NONE)

    @property
    def shannon(self) -> float:
        """The order-0 bound in bytes of all tensors."""
        return sum(entry.shannon for entry in self.entries)

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

    Of a delta these are the differences from its base. Raises `BadFile` as `load` does.

    >>> import tempfile
    >>> from karikomi.pack import save
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     seen = inspect(save({"x": np.zeros((10, 10), np.int8)}, folder + "/x.karikomi"))
    >>> seen.entries[0].codec, seen.entries[0].payload, seen.payload + seen.tables
    ('adaptive', 1, 1)
    """
    with opened(path, budget, apart=True) as file:
        groups = file.contents.groups
        lengths = [float(len(entry.name) + 8 * len(entry.shape) + 20) for entry in file.entries]
        shares = iter(_shared(file.contents.manifest, lengths))
        accounts = tuple(
            account
            for group in groups
            for account in _accounts(group, file, [next(shares) for _ in group.entries])
        )
        accounts += tuple(_equal(name, accounts, other) for name, other in file.equal.items())
        inside = len(file.header.manifest or "")
        return Inspection(
            entries=tuple(sorted(accounts, key=lambda account: account.name in file.equal)),
            notes=file.notes,
            payload=sum(account.payload for account in accounts),
            tables=sum(account.tables for account in accounts),
            header=file.header.size - inside,
            manifest=file.contents.manifest,
            total=file.size,
        )


def _accounts(group: TensorGroup, file: Opened, manifests: list[int]) -> list[SizeAccount]:
    """Return the accounts of a group's tensors; what they share is shared out by their bounds."""
    tensors = file.decoded(group)
    bounds = [shannon(item.stored) for item in tensors]
    scales = [len(written_grids([item.stored])) for item in tensors]
    whole = len(written_grids([item.stored for item in tensors]))
    scales = _shared(min(whole, group.tables), [float(size) for size in scales])
    weights = [
        bound + 1e-9 * item.entry.size + 1e-12 for bound, item in zip(bounds, tensors, strict=True)
    ]
    payloads = _shared(sum(group.chunks), weights)
    models = _shared(group.tables - sum(scales), weights)
    indices = _indices(group, file) if group.codec == gaps.NAME else 0
    return [
        _account(item, group, file, bound, payload, model, scale, share, placed)
        for item, bound, payload, model, scale, share, placed in zip(
            tensors,
            bounds,
            payloads,
            models,
            scales,
            manifests,
            _shared(indices, weights),
            strict=True,
        )
    ]


def _account(
    item: Decoded,
    group: TensorGroup,
    file: Opened,
    bound: float,
    payload: int,
    model: int,
    scales: int,
    manifest: int,
    indices: int,
) -> SizeAccount:
    entry, value = item.entry, item.dense
    return SizeAccount(
        name=entry.name,
        shape=entry.shape,
        dtype=entry.dtype,
        quantizer=GRID_CODECS[entry.grid[0]].text(entry.grid[1:]) if entry.grid else NONE,
        codec=group.codec,
        elements=math.prod(entry.shape),
        nonzero=int(np.count_nonzero(value)),
        dense=-(-value.size * (32 if entry.grid else DTYPES[entry.dtype].bits) // 8),
        payload=payload,
        tables=model + scales,
        header=_directory_bytes(entry.name, file),
        manifest=manifest,
        scales=scales,
        indices=indices,
        shannon=bound,
    )


def _indices(group: TensorGroup, file: Opened) -> int:
    """Return the bytes of the gap streams of a group."""
    file.stream.seek(group.start + group.tables)
    cursor = Cursor(file.stream.read(group.size - group.tables))
    return sum(gaps.index_bytes(cursor.take(length)) for length in group.chunks)


def _equal(name: str, accounts: Sequence[SizeAccount], other: str) -> SizeAccount:
    """Return the account of a tensor that is stored as another: it takes no bytes, in the file and before."""
    like = next(account for account in accounts if account.name == other)
    none = ("dense", "payload", "tables", "header", "manifest", "scales", "indices")
    return replace(like, name=name, codec=f"= {other}", shannon=0.0, **dict.fromkeys(none, 0))


def _directory_bytes(name: str, file: Opened) -> int:
    if name not in file.header.spans:
        return 0
    start, end = (at - file.header.size for at in file.header.spans[name])
    text = json.dumps(
        {name: header.directory_entry(start, end)}, separators=(",", ":"), ensure_ascii=False
    )
    return len(text.encode("utf-8")) - 1


def _shared(whole: int, weights: Sequence[float]) -> list[int]:
    """Return whole numbers in proportion to `weights` that sum to `whole`."""
    sums = np.cumsum(weights)
    ends = np.rint(sums / max(float(sums[-1]), 1e-300) * whole) if len(sums) else sums
    return np.diff(ends, prepend=0).astype(int).tolist()
