"""Prune a safetensors file that may be larger than memory: read in blocks, decided by counts, written in blocks."""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from karikomi.errors import BadFile, Unsupported
from karikomi.files import as_path, write_atomically
from karikomi.pack.container.header import LENGTH_BYTES
from karikomi.pack.plain import StoredTensor, directory
from karikomi.pack.read_budget import MOST_RANK
from karikomi.prune import Score, as_score
from karikomi.prune.allocations import allocation as allocations
from karikomi.prune.allocations.allocation import Pool, allocate, check_sparsity
from karikomi.prune.radix_threshold import Threshold
from karikomi.select import NOT_SELECTED, select
from karikomi.selection.block_scores import BlockScores, check_blockwise, pool_threshold, split
from karikomi.selection.granularity import check_range, of_weights
from karikomi.selection.weight_source import Source, source_of

WHERE = "numpy.prune_file"
CHUNK = 1 << 20
"""Entries read at once; a multiple of eight, so that packed masks of chunks follow one another."""

_TYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class FileReport:
    """The result of `prune_file`: `counts`, tensor -> ``(pruned weights, all weights)``.

    `path`: the file written. `left_alone`: tensor -> why it was copied as it is.
    """

    path: Path
    counts: dict[str, tuple[int, int]]
    left_alone: dict[str, str] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """The share of the selected weights that were pruned, in [0, 1)."""
        total = sum(size for _, size in self.counts.values())
        return sum(removed for removed, _ in self.counts.values()) / total if total else 0.0


def prune_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    sparsity: float,
    score: str | Score = "magnitude",
    allocation: str = "global",
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    masks: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> FileReport:
    """Write a safetensors file with the least important weights of another set to zero, and return a report.

    The same weights are pruned as by `prune` of the same arrays, in the order of the file; a few MiB of
    memory are used, whatever the size of the file or of a tensor. The file is read three or four times.
    Types, shapes, metadata and the order of tensors are kept.

    `source`: a safetensors file, of any rank; F16, BF16, F32 and F64 tensors can be pruned, others are copied.
    `target`: written atomically; may be `source`. `sparsity`: the share of all selected weights to prune,
    in [0, 1). `score`: by single weights alone, such as ``magnitude``. `allocation`: one that
    needs no measured facts and no scores, such as ``global``, ``uniform`` or ``erk``. `only`, `exclude`: globs
    over tensor names; without them all that can be pruned are, biases too. `masks`: a second
    file, of `pack_mask`'s bytes by tensor name, their shapes as JSON under ``shapes`` in its metadata.
    `progress`: called with ``(bytes written, bytes in all)`` as these are written.

    Raises `BadFile` for a source that is damaged or truncated, `Unsupported` for a score of more than single
    weights, `NonFinite` naming a tensor, `UnknownName`, `InvalidArgument`, `Unwritable`.

    >>> import tempfile
    >>> from safetensors.numpy import load_file, save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"w": np.array([3.0, -1.0, 2.0, -4.0])}, f"{folder}/dense.safetensors")
    ...     report = prune_file(f"{folder}/dense.safetensors", f"{folder}/half.safetensors", sparsity=0.5)
    ...     report.counts, load_file(report.path)["w"].tolist()
    ({'w': (2, 4)}, [3.0, 0.0, 0.0, -4.0])

    Source: radix selection over a stream, see `karikomi.prune.radix_threshold`; Han et al. 2015 (magnitude).
    """
    check_sparsity(sparsity, where=f"{WHERE}: sparsity")
    chosen = as_score(score)
    check_blockwise(chosen, where=WHERE)
    path, out = as_path(source).expanduser(), as_path(target).expanduser()
    bits = None if masks is None else as_path(masks).expanduser()
    if bits is not None and os.path.realpath(bits) in map(os.path.realpath, (path, out)):
        raise Unsupported("masks and weights go into two files", where=WHERE, got=str(bits))
    with _opened(path) as file:
        weights, left_alone = _selected(file, only, exclude)
        limits = _limits(file, weights, chosen, allocation, sparsity)
        writing = _Writing(file, limits, chosen, progress)
        if bits is None:
            write_atomically(out, writing.run)
        else:
            write_atomically(out, lambda stream: _write_both(writing, weights, stream, bits))
    return FileReport(out, writing.counts, left_alone)


@dataclass(frozen=True, slots=True)
class _File:
    """An open file and the directory of its tensors."""

    where: str
    stream: BinaryIO
    tensors: list[StoredTensor]
    start: int
    reading: threading.Lock = field(default_factory=threading.Lock)

    def read(self, start: int, end: int, dtype: str = "u1") -> Iterator[np.ndarray]:
        """Yield the bytes between two offsets in chunks, each a new array."""
        step = CHUNK * np.dtype(dtype).itemsize
        for at in range(start, end, step):
            yield self._exactly(at, np.empty(min(step, end - at), "u1")).view(dtype)

    def floats(self, tensor: StoredTensor) -> Iterator[np.ndarray]:
        """Yield a tensor's entries in index order in blocks."""
        for chunk in self.read(tensor.start, tensor.end, _TYPES[tensor.dtype]):
            yield from split(_floats(tensor, chunk))

    def _exactly(self, at: int, out: np.ndarray) -> np.ndarray:
        view, done = out.data, 0
        try:
            with self.reading:
                self.stream.seek(at)
                while done < len(view):
                    count = self.stream.readinto(view[done:])  # type: ignore[attr-defined]
                    if not count:
                        raise BadFile("the file became shorter while it was read", where=self.where)
                    done += count
        except OSError as error:
            raise BadFile(f"cannot be read ({error.strerror})", where=self.where) from error
        return out


@contextmanager
def _opened(path: Path) -> Iterator[_File]:
    where = str(path)
    try:
        # Before opening: opening a pipe would block without a writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadFile("not a regular file", where=where)
        # Not mapped: mapped pages would count as memory in use. Not buffered: chunks are large.
        stream = path.open("rb", buffering=0)
    except OSError as error:
        raise BadFile(f"cannot be read ({error.strerror})", where=where) from error
    with stream:
        tensors, start = directory(stream, os.fstat(stream.fileno()).st_size, where)  # type: ignore[arg-type]
        yield _File(where, stream, tensors, start)  # type: ignore[arg-type]


def _selected(
    file: _File, only: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    names = set(
        select([item.name for item in file.tensors], only=only, exclude=exclude, where=WHERE)
    )
    left_alone = {}
    for tensor in file.tensors:
        if tensor.name not in names:
            left_alone[tensor.name] = NOT_SELECTED
        elif tensor.dtype not in _TYPES:
            left_alone[tensor.name] = f"its dtype is {tensor.dtype}"
    chosen = {item.name: item for item in file.tensors if item.name not in left_alone}
    if not chosen:
        raise Unsupported(
            "nothing of this can be pruned",
            where=f"{WHERE}: {file.where}",
            got="; ".join(f"{name}: {why}" for name, why in list(left_alone.items())[:3]),
            allowed=f"tensors of {', '.join(_TYPES)}",
        )
    return chosen, left_alone


def _limits(
    file: _File, weights: Mapping[str, StoredTensor], score: Score, allocation: str, sparsity: float
) -> list[tuple[Pool, Threshold]]:
    """Return the pools and their thresholds."""
    scored = {name: _scored(file, tensor, score) for name, tensor in weights.items()}
    facts = {
        name: allocations.Tensor(items=tensor.size, shape=tensor.shape)
        for name, tensor in weights.items()
    }
    pools = allocate(allocation, facts, sparsity)
    return [(pool, pool_threshold([scored[n] for n in pool.names], pool.remove)) for pool in pools]


def _scored(file: _File, tensor: StoredTensor, score: Score) -> BlockScores:
    # NumPy has no more axes, and a score of single weights needs none.
    shape = tensor.shape if len(tensor.shape) <= MOST_RANK else (tensor.size,)

    def array() -> np.ndarray:
        return np.concatenate(list(file.floats(tensor))).reshape(shape)

    source = Source(
        name=tensor.name,
        shape=shape,
        array=array,
        blocks=lambda: file.floats(tensor),
        itemsize=np.dtype(_TYPES[tensor.dtype]).itemsize,
        where=file.where,
    )
    check_range(source)
    return of_weights(source, score, None)


def _floats(tensor: StoredTensor, raw: np.ndarray) -> np.ndarray:
    """Return raw entries as floats: NumPy has no bfloat16, which is the upper half of a float32."""
    if tensor.dtype != "BF16":
        return raw
    return (raw.astype("<u4") << np.uint32(16)).view("<f4")


class _Writing:
    """The last pass over the file: every tensor is written, pruned weights as zeros; `counts` fill as it runs."""

    def __init__(
        self,
        file: _File,
        limits: Sequence[tuple[Pool, Threshold]],
        score: Score,
        progress: Progress | None,
    ) -> None:
        self.file, self.counts = file, {}
        self._score, self._progress = score, progress
        self._pools = {name: place for place, (pool, _) in enumerate(limits) for name in pool.names}
        self._limits = [limit for _, limit in limits]
        self._total = max((tensor.end for tensor in file.tensors), default=file.start)

    def run(self, out: BinaryIO, bits: BinaryIO | None = None) -> None:
        """Write the weights to `out` and their masks to `bits`."""
        for chunk in self.file.read(0, self.file.start):
            out.write(chunk.data)
        for tensor in self.file.tensors:
            if tensor.name in self._pools:
                self._prune(tensor, out, bits)
                continue
            for chunk in self.file.read(tensor.start, tensor.end):
                self._write(chunk, out)

    def _prune(self, tensor: StoredTensor, out: BinaryIO, bits: BinaryIO | None) -> None:
        pool, removed = self._pools[tensor.name], 0
        for raw in self.file.read(tensor.start, tensor.end, _TYPES[tensor.dtype]):
            stays = np.empty(len(raw), bool)
            scores = of_weights(source_of(tensor.name, _floats(tensor, raw)), self._score, None)
            limit = self._limits[pool]
            done = scores.kept(limit, stays)
            self._limits[pool] = replace(limit, ties=limit.ties - done)
            removed += len(stays) - int(np.count_nonzero(stays))
            # The bits times 0 or 1: no infinity, no sign, no rounding comes in between.
            plain = raw.view(f"<u{raw.itemsize}")
            np.multiply(plain, stays, out=plain)
            self._write(raw, out)
            if bits is not None:
                bits.write(np.packbits(stays).data)
        self.counts[tensor.name] = removed, tensor.size

    def _write(self, chunk: np.ndarray, out: BinaryIO) -> None:
        out.write(chunk.data)
        if self._progress is not None:
            self._progress(out.tell(), self._total)


def _write_both(
    writing: _Writing, weights: Mapping[str, StoredTensor], out: BinaryIO, path: Path
) -> None:
    """Write weights and masks, the masks into a safetensors file of their own."""
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    whole: dict[str, object] = {"__metadata__": {"shapes": json.dumps(shapes)}}
    at = 0
    for name, shape in shapes.items():
        size = -(-math.prod(shape) // 8)
        whole[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(whole).encode()
    text += b" " * (-len(text) % 8)

    def write(bits: BinaryIO) -> None:
        bits.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        writing.run(out, bits)

    write_atomically(path, write)
