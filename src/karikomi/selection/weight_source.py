"""One weight as a framework passes it to the selection: entries as NumPy arrays, axes, facts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from zlib import crc32

import numpy as np

from karikomi.prune.layout import Layout
from karikomi.prune.scores.score import Score
from karikomi.selection.block_scores import split
from karikomi.selection.shard import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One weight.

    `array`: returns all of it, in any float dtype. `blocks`: returns its entries in index order, in 1-D
    blocks (the default splits the array). `layout`: which axes are units and inputs, where that is known.
    `facts`: measured facts, broadcastable to the shape, or of shape (units,). `macs`: multiply-accumulates
    per weight and example. `itemsize`: bytes of a weight. `where`: a prefix for errors. `part`: set where
    this is a shard of a weight, `shape` and the rest being those of the shard; see `BlockScores`.
    """

    name: str
    shape: tuple[int, ...]
    array: Callable[[], np.ndarray]
    blocks: Callable[[], Iterable[np.ndarray]] | None = None
    layout: Layout | None = None
    facts: Mapping[str, np.ndarray] = field(default_factory=dict)
    macs: float = math.nan
    itemsize: int = 4
    where: str = ""
    part: Shard | None = None

    @property
    def label(self) -> str:
        """How errors name it."""
        return f"{self.where}: {self.name}" if self.where else self.name

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the whole weight."""
        return self.shape if self.part is None else self.part.whole

    def entries(self) -> Iterable[np.ndarray]:
        """Return the entries in index order, in blocks."""
        return self.blocks() if self.blocks is not None else split(self.array())


def source_of(name: str, array: np.ndarray, **known: object) -> Source:
    """Return the source of an array that is in memory."""
    return Source(
        name=name,
        shape=array.shape,
        array=lambda: array,
        itemsize=array.dtype.itemsize,
        **known,  # type: ignore[arg-type]
    )


def with_noise(sources: Mapping[str, Source], score: Score) -> dict[str, Source]:
    """Return the sources with noise that depends on the score's seed and the tensor's name alone."""
    seed = getattr(score, "seed", 0)

    def noisy(source: Source) -> Source:
        generator = np.random.Generator(np.random.Philox(key=[seed, crc32(source.name.encode())]))
        noise = np.float32(1.0) - generator.random(source.shape, np.float32)
        return replace(source, facts={**source.facts, "noise": noise})

    return {name: noisy(source) for name, source in sources.items()}
