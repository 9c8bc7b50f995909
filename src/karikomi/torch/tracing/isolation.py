"""Training that leaves the caller's process as it found it: random numbers and thread count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def isolated(seed: int, threads: int) -> Iterator[None]:
    """Seed torch and set its thread count for the block, and put both back afterwards.

    `threads`: 0 leaves the count as it is.
    """
    before = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if threads:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
