"""Work on several tensors at once, in threads: NumPy releases the interpreter lock within a block."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Thing = TypeVar("Thing")
Result = TypeVar("Result")

ENOUGH = 1 << 20
"""Starting threads takes longer than work on fewer entries than these."""

MOST = 8
"""More threads than these only wait for the memory."""

_here = threading.local()


def each(
    function: Callable[[Thing], Result], things: Sequence[Thing], *, entries: int
) -> list[Result]:
    """Return ``[function(one) for one in things]``, in threads if they have `entries` enough.

    Of several errors the first by order is raised. Within one of these threads no more are started.
    """
    threads = min(workers(), len(things))
    if threads <= 1 or entries < ENOUGH or getattr(_here, "busy", False):
        return [function(thing) for thing in things]
    with ThreadPoolExecutor(threads, initializer=_begin) as pool:
        return list(pool.map(function, things))


def evenly(
    things: Sequence[Thing], lists: int, *, entries: Callable[[Thing], int]
) -> list[list[Thing]]:
    """Return the things in so many lists, or as many as there are things, of about as many entries each.

    >>> evenly([1, 5, 3, 4], 2, entries=int)
    [[5, 1], [4, 3]]
    """
    found: list[list[Thing]] = [[] for _ in range(min(lists, len(things)))]
    sizes = [0] * len(found)
    for thing in sorted(things, key=entries, reverse=True):
        least = sizes.index(min(sizes))
        found[least].append(thing)
        sizes[least] += entries(thing)
    return found


def workers() -> int:
    """Return ``OMP_NUM_THREADS``, as other libraries do, or the number of cores; at most `MOST`."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked):
        return min(int(asked), MOST)
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return min(cores, MOST)


def _begin() -> None:
    _here.busy = True
