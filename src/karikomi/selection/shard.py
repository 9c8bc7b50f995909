"""One shard of a tensor whose other shards are on other processes: counts are summed, ties divided among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The rectangle of a tensor that is stored on this process.

    `whole`: the shape of the tensor. `shape`: of the part. `offsets`: where it begins, by axis. `summed`:
    returns an array of int64 added up over all parts, each entry of the tensor counted once; a collective.
    `over`: the ranks; tensors over the same ranks are summed at once, others in the order of this.
    """

    whole: tuple[int, ...]
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    summed: Callable[[np.ndarray], np.ndarray]
    over: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of entries of the whole tensor."""
        return math.prod(self.whole)

    def total(self, *numbers: int) -> list[int]:
        """Return some whole numbers, each added up over all parts."""
        return self.summed(np.array(numbers, np.int64)).tolist()

    def first(self, indices: np.ndarray, count: int) -> tuple[int, int]:
        """Return ``(how many here, how many in all)``, `indices` ascending, are the first `count`. A collective."""
        everywhere = self.total(len(indices))[0]
        if everywhere <= count:
            return len(indices), everywhere
        here = np.unravel_index(indices, self.shape)
        there = [axis + start for axis, start in zip(here, self.offsets, strict=True)]
        places = np.ravel_multi_index(there, self.whole)
        low, high = 0, self.size
        while low < high:
            middle = (low + high) // 2
            if self.total(int(np.searchsorted(places, middle)))[0] >= count:
                high = middle
            else:
                low = middle + 1
        return int(np.searchsorted(places, low)), count
