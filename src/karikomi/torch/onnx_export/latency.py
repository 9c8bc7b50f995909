"""Latency of ONNX files in onnxruntime, measured in turns, with what the processor is."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument, check
from karikomi.torch.onnx_export.engine_runs import engine_name, outputs_of, session_of
from karikomi.torch.onnx_export.float_graph import Feeds
from karikomi.torch.onnx_export.graph_edits import WHERE

FLAGS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "asimddp", "i8mm")
_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one file at one batch size: the median, and the fastest run.

    `ms`: of wall-clock time, `cpu_ms`: of processor time, which other programs on the machine lengthen less.
    `ratio`: how many times as fast as the first file, by the medians of processor time.
    """

    name: str
    batch: int
    ms: float
    ms_least: float
    cpu_ms: float
    ratio: float
    runs: int
    threads: int
    engine: str
    processor: str
    instructions: str

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        return asdict(self)

    def __str__(self) -> str:
        """Return one line."""
        return (
            f"{self.name}, batch {self.batch}: {self.ms:.3f} ms (fastest {self.ms_least:.3f},"
            f" processor {self.cpu_ms:.3f}), {self.ratio:.2f}x ({self.engine}, {self.threads} threads,"
            f" {self.instructions})"
        )


def instructions() -> str:
    """Return the instruction sets of the processor that integer kernels use, as the system names them.

    >>> isinstance(instructions(), str)
    True
    """
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            words = {
                word
                for line in lines
                if line.startswith(("flags", "Features"))
                for word in line.split()
            }
    except OSError:
        return "unknown"
    return " ".join(flag for flag in FLAGS if flag in words) or platform.machine()


def measure_onnx(
    files: Mapping[str, str | os.PathLike[str]],
    *,
    batches: Sequence[int] = (1, 32),
    sizes: Mapping[str, int] | None = None,
    threads: int = 1,
    seconds: float = 2.0,
    feeds: Mapping[int, Feeds] | None = None,
) -> list[Latency]:
    """Return the latency of ONNX files of one network, run in turns so that all meet the same load.

    `files`: name -> path; the first is what the others are compared with. `batches`: sizes of the open axis
    ``batch``; `sizes`: of other open axes, by name. `feeds`: batch size -> inputs, by default random ones.
    `seconds`: of measuring at each batch size; at least five runs of each file.

    Raises `InvalidArgument` for no files, and an open axis without a size, `Unavailable` without onnxruntime.
    """
    check(WHERE, (files, "there is no file to measure", None, None))
    check(WHERE, (threads >= 1 and seconds > 0, "out of range", (threads, seconds), "> 0"))
    sessions = {name: session_of(os.fspath(path), threads=threads) for name, path in files.items()}
    rows: list[Latency] = []
    for batch in batches:
        first = next(iter(sessions.values()))
        given = feeds[batch] if feeds else _random(first, batch, sizes or {})
        rows += _rows(sessions, given, batch, threads, seconds)
    return rows


def _rows(
    sessions: Mapping[str, Any], feeds: Feeds, batch: int, threads: int, seconds: float
) -> list[Latency]:
    wall: dict[str, list[float]] = {name: [] for name in sessions}
    cpu: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        outputs_of(session, feeds)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(wall.values()))) < 5:
        for name, session in sessions.items():
            start, used = time.perf_counter(), time.process_time()
            outputs_of(session, feeds)
            cpu[name].append(1e3 * (time.process_time() - used))
            wall[name].append(1e3 * (time.perf_counter() - start))
    middle = {name: statistics.median(times) for name, times in cpu.items()}
    least = next(iter(middle.values()))
    return [
        Latency(
            name=name,
            batch=batch,
            ms=statistics.median(wall[name]),
            ms_least=min(wall[name]),
            cpu_ms=middle[name],
            ratio=least / middle[name] if middle[name] else 1.0,
            runs=len(wall[name]),
            threads=threads,
            engine=engine_name(),
            processor=platform.processor() or platform.machine(),
            instructions=instructions(),
        )
        for name in sessions
    ]


def _random(session: Any, batch: int, sizes: Mapping[str, int]) -> Feeds:
    """Return inputs of the shapes that a session asks for: normal floats, integers 0 and 1."""
    generator, made = np.random.default_rng(0), {}
    for value in session.get_inputs():
        shape = [_size(size, batch, sizes) for size in value.shape]
        dtype = _DTYPES.get(value.type)
        if dtype is None:
            raise InvalidArgument(
                "no random inputs of this type", where=WHERE, got=value.type, hint="pass feeds="
            )
        made[value.name] = (
            generator.standard_normal(shape, np.float32)
            if dtype is np.float32
            else generator.integers(0, 2, shape).astype(dtype)
        )
    return made


def _size(size: Any, batch: int, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    if size is None or (size != "batch" and not str(size).endswith("_0") and size not in sizes):
        raise InvalidArgument("an open axis without a size", where=WHERE, got=size, hint="sizes=")
    return sizes.get(size, batch)
