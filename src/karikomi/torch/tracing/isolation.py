"""Random numbers and thread count, set for a block and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def isolated(seed: int, threads: int) -> Iterator[None]:
    """Seed torch and set its thread count (0: unchanged) for the block, and restore both afterwards."""
    before = torch.get_num_threads()
    with torch.random.fork_rng():
        _seed(seed)
        if threads:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _seed(seed: int) -> None:
    # torch.manual_seed notes a traceback for each kind of device that was never used, which costs more
    # than a small network's step; without an accelerator there is one generator to seed.
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
