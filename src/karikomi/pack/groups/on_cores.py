"""Work on several cores: NumPy, hashlib and the coders let other threads run meanwhile."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
Found = TypeVar("Found")
MOST_THREADS = 4
AHEAD = 2
"""Groups of a file that are decoded at a time: while one is hashed, which takes one core, the next is decoded."""


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_threads(function: Callable[[T], Found], items: Sequence[T]) -> list[Found]:
    """Return `function` of each item, in order, on as many threads as there are cores, at most `MOST_THREADS`."""
    threads = min(len(items), cores(), MOST_THREADS)
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


def ahead(function: Callable[[T], Found], items: Iterable[T]) -> Iterator[Found]:
    """Yield `function` of each item, in order, while at most `AHEAD` of them are at work or wait to be taken.

    Items are drawn in the calling thread; an error of the function is raised at the turn of its item.

    >>> list(ahead(abs, [-1, 2]))
    [1, 2]
    """
    if cores() < 2:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[Future[Found]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
