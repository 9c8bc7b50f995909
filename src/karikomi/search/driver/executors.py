"""Where candidates are evaluated: in this process, in processes of this machine, or on a dask cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

from karikomi.errors import Unavailable, Unsupported, check

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class InlineExecutor(Executor):
    """An executor of one place that evaluates in this process, before `submit` returns."""

    places = 1

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return the finished future of ``fn(*args, **kwargs)``; an interruption is raised at once."""
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Workers(Executor):
    """So many processes of this machine, each a pool of its own: one that is killed takes no other with it.

    Processes are spawned, with one thread each. At most `places` candidates are under way; `submit` raises
    `Unsupported` for more.
    """

    def __init__(self, places: int) -> None:
        good = isinstance(places, int) and places >= 1
        check("Workers", (good, "the number of workers", places, ">= 1"))
        self.places = places
        self._pools: list[ProcessPoolExecutor | None] = [None] * places
        self._running: list[Future[Any] | None] = [None] * places
        self._named: list[Future[int] | None] = [None] * places

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Evaluate in a process that is free; the place of a killed one has a new process."""
        for place, running in enumerate(self._running):
            if running is None or running.done():
                future = self._submitted(place, fn, args, kwargs)
                self._running[place] = future
                return future
        raise Unsupported("all workers are busy", where="Workers", got=self.places)

    def pids(self) -> list[int]:
        """Return the process identifiers of the workers that have begun."""
        begun = [named for named in self._named if named is not None and named.done()]
        return [named.result() for named in begun if named.exception() is None]

    def __exit__(self, kind: Any, *_: Any) -> None:
        """End all processes; after an error or an interruption without waiting for what they are at."""
        if kind is not None:
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        self.shutdown()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End all processes, after what they are at."""
        for pool in self._pools:
            if pool is not None:
                pool.shutdown(wait=wait, cancel_futures=cancel_futures)
        self._named = [None] * self.places

    def _submitted(
        self, place: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Future[Any]:
        pool = self._pools[place]
        if pool is not None:
            try:
                return pool.submit(fn, *args, **kwargs)
            except RuntimeError:
                # Its process was killed (BrokenProcessPool): the pool takes nothing more.
                pool.shutdown(wait=False)
        context = multiprocessing.get_context("spawn")
        fresh = ProcessPoolExecutor(1, mp_context=context, initializer=_begin)
        self._pools[place] = fresh
        with _one_thread_each():
            self._named[place] = fresh.submit(os.getpid)
            return fresh.submit(fn, *args, **kwargs)


@contextmanager
def opened(workers: int = 1, scheduler: str | None = None) -> Iterator[Executor]:
    """Open the executor for so many workers, or that of a dask scheduler (``tcp://host:port``), and end it.

    With one worker candidates are evaluated in this process. Raises `Unavailable` where dask.distributed is not
    installed, and `Unsupported` where no scheduler answers or it has no workers.
    """
    if scheduler is not None:
        with _on_cluster(scheduler) as executor:
            yield executor
        return
    good = isinstance(workers, int) and not isinstance(workers, bool) and workers >= 1
    check("opened", (good, "the number of workers", workers, ">= 1"))
    executor = InlineExecutor() if workers == 1 else Workers(workers)
    with executor:
        yield executor


def places_of(executor: Executor) -> int:
    """Return how many candidates an executor evaluates at once."""
    return int(getattr(executor, "places", 1))


def _begin() -> None:
    """Prepare a worker: interruptions are its parent's to handle, and it ends when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        # Its queue has no end of file then, because a worker holds both ends.
        connection.wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _on_cluster(scheduler: str) -> Iterator[Executor]:
    try:
        import distributed
    except ImportError as error:
        raise Unavailable(
            "dask.distributed is not installed", where="scheduler", hint="pip install distributed"
        ) from error
    try:
        client = distributed.Client(scheduler, timeout="20s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise Unsupported(
            "no scheduler answers", where="scheduler", got=f"{scheduler}: {error}"
        ) from error
    with client:
        places = sum(client.nthreads().values())  # pyright: ignore[reportAttributeAccessIssue]
        if not places:
            raise Unsupported("the scheduler has no workers", where="scheduler", got=scheduler)
        # A candidate is a pure function, but two of the same must not share one failure.
        executor = client.get_executor(pure=False)
        executor.places = places  # pyright: ignore[reportAttributeAccessIssue]
        yield executor


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Start processes with one thread: thread pools read the environment when their library is loaded."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
