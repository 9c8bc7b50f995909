"""What holds for every collected test: the process set-up, and code blocks in Markdown that run.

It stands at the root because pytest applies such a file to its own folder only, and examples live
in docstrings (src/), in README.md and in docs/ as much as in tests/.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import depth

# One thread, so that sums are rounded alike on every machine and workers do not fight for cores.
# Set before the first framework is imported, and inherited by the workers.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "torch")

WORKER = os.environ.get("PYTEST_XDIST_WORKER")

IN_MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
ROOM = 2 << 30  # bytes; the files of a run take about half a gigabyte


def _write_to_memory() -> str | None:
    """Return a new folder in memory that temporary files go to from here on, None where there is no room.

    A disk takes 10 to 40 ms for each of the thousands of files that are written in one piece (fsync), or written
    again. A TMPDIR that is set is kept, and so are the files of a run there.
    """
    try:
        if "TMPDIR" in os.environ or shutil.disk_usage(IN_MEMORY).free < ROOM:
            return None
        if os.statvfs(IN_MEMORY).f_flag & os.ST_NOEXEC:  # of containers; compiled code is loaded
            return None
        os.environ["TMPDIR"] = mkdtemp(prefix="karikomi-tests-", dir=IN_MEMORY)
    except OSError:
        return None
    tempfile.tempdir = None  # is looked up again
    return os.environ["TMPDIR"]


_in_memory = _write_to_memory()


def pytest_unconfigure() -> None:
    """Remove the files of the run from memory; not at the exit of a process, which a fork may leave out."""
    if _in_memory:
        shutil.rmtree(_in_memory, ignore_errors=True)


def _compile_quickly() -> None:
    """Let JAX compile the same step once per worker, and with little effort, as it runs a few times only.

    JAX writes an entry in place: each worker has its own folder, and the processes it starts use that one.
    """
    effort = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
    os.environ.setdefault("XLA_FLAGS", effort)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    if WORKER or "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = mkdtemp(prefix="karikomi-jax-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


if not depth.FULL:
    _compile_quickly()

# torch and TensorFlow each bring their own copies of native libraries; a fixed order keeps a run
# from depending on which test file happens to be the first.
with contextlib.suppress(ImportError):
    import torch  # noqa: F401

import pytest  # noqa: E402
from sybil import Sybil  # noqa: E402
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser  # noqa: E402
from xdist.remote import Producer  # noqa: E402
from xdist.scheduler import LoadScopeScheduling  # noqa: E402
from xdist.workermanage import WorkerController  # noqa: E402


def _enter_scratch(namespace: dict[str, object]) -> None:
    scratch = TemporaryDirectory(prefix="karikomi-docs-")
    namespace["_scratch"] = (scratch, Path.cwd())
    os.chdir(scratch.name)


def _leave_scratch(namespace: dict[str, object]) -> None:
    scratch, before = namespace["_scratch"]  # type: ignore[misc]
    os.chdir(before)
    scratch.cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    path=str(Path(__file__).parent),
    setup=_enter_scratch,
    teardown=_leave_scratch,
).pytest()


# One test each that takes minutes: what begins last ends last.
LONGEST = ("tests/unit/test_keras_backends.py", "tests/unit/test_compress.py::test_kill_9")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest; and let a block on a page leave a file to be closed, which sybil cannot report."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    for item in items:
        if item.path.suffix == ".md":
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))


def pytest_collection_finish() -> None:
    """Leave what was imported out of later collections of garbage, and let these be rare: a twentieth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


EVERY = 100  # tests, after which what is alive is left out as well
_ended = 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """Leave what frameworks and caches hold by now out of later collections, which take a second each with it."""
    global _ended
    _ended += 1
    if _ended % EVERY == 0:
        gc.collect()
        gc.freeze()


MOST_MEMORY = 1_700  # MB of one process, above which what JAX has compiled is forgotten
_grown = MOST_MEMORY


def _memory() -> int:
    """Return the resident memory of this process in MB; 0 where the system has no such file."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Forget what JAX has compiled where that has grown large: it is kept for as long as the process lives."""
    global _grown
    if "jax" in sys.modules and _memory() > _grown:
        sys.modules["jax"].clear_caches()
        gc.collect()
        _grown = max(MOST_MEMORY, _memory() + 200)


# What marks a file whose tests share what takes long to make: two workers would make it twice.
SHARES = re.compile(
    r"^@pytest\.fixture\(scope=\"module\"|^@(functools\.)?(lru_)?cache\b", re.MULTILINE
)
# What lies, or begins, like this shares what is parsed, compiled or imported by all of it.
TOGETHER = ("tests/layout/", "tests/ranks/", "tests/unit/test_jax", "tests/unit/test_transformers")


@functools.cache
def _shared(file: str) -> str | None:
    """Return the name of what the tests of a file share with each other, or with those of other files."""
    for beginning in TOGETHER:
        if file.startswith(beginning):
            return beginning
    path = Path(__file__).parent / file
    if path.suffix == ".md" or SHARES.search(path.read_text("utf-8")):
        return file
    return None


# A rule that a framework compiles: all laws of it one after another, so that it is compiled once and then forgotten.
COMPILED = re.compile(r"tests/contract/.*\[(?:float\d+-)?(.*?-(?:jax\.jit|tf\.function))")


class _WhatSharesStaysTogether(LoadScopeScheduling):
    """Send the blocks of one page, the tests that share a set-up, and those of one compiled rule to one worker.

    A later block of a page uses the names of an earlier one. Other tests go to any free worker.
    (``--dist loadgroup`` would do the same, but pytest-xdist 3.8 loses the groups under pytest 9.2,
    silently: its issue 1386.)
    """

    def _split_scope(self, nodeid: str) -> str:
        compiled = COMPILED.match(nodeid)
        if compiled:
            return compiled[1]
        return _shared(nodeid.partition("::")[0]) or nodeid

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        """Note what a worker collected, and where each test stands in it."""
        super().add_node_collection(node, collection)
        if node in self.registered_collections:
            self.registered_collections[node] = _Places(collection)

    def mark_test_complete(
        self, node: WorkerController, item_index: int, duration: float = 0
    ) -> None:
        """Note that a test has ended, and forget a unit of which it was the last.

        pytest-xdist counts all tests that a worker ever had after each of them.
        """
        units, nodeid = self.assigned_work[node], self.registered_collections[node][item_index]
        scope = self._split_scope(nodeid)
        units[scope][nodeid] = True
        if all(units[scope].values()):
            del units[scope]
        self._reschedule(node)


class _Places(list[str]):
    """Tests in their order, of which each is found at once: pytest-xdist looks each up once."""

    def __init__(self, nodeids: Iterable[str]) -> None:
        super().__init__(nodeids)
        self._places = {nodeid: place for place, nodeid in enumerate(self)}

    def index(self, nodeid: str, *_: object) -> int:  # type: ignore[override]
        """Return the place of a test."""
        return self._places[nodeid]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Distribute tests by `_WhatSharesStaysTogether`, whatever ``--dist`` is."""
    return _WhatSharesStaysTogether(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Run docstring examples in an empty folder, so that one may save a file.

    A fixture would be set up for every test.
    """
    if not isinstance(item, pytest.DoctestItem):
        return (yield)
    with TemporaryDirectory(prefix="karikomi-docstring-") as folder, contextlib.chdir(folder):
        return (yield)
