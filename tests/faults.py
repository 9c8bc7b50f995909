"""Plant faults in a copy of the tree, one at a time, and see that the tests find each of them.

    python tests/faults.py                      # all of them
    python tests/faults.py sweep 'audit/*'      # those whose name or file fits a pattern
    python tests/faults.py --list

The faults stand in ``tests/planted/*.toml``: a file, the text that is there, the text that replaces it, and
the tests that must find it. A fault is *found* if one of these tests fails with it and passes without it.
It is *missed* if all of them pass; *void* if its text is not in its file exactly once, or if nothing could be run.
The checkout itself is never changed. Each trial is a child process (``os.fork``: Linux and macOS). The exit code
is 1 unless every fault was found.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import fnmatch
import json
import os
import py_compile
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(
        _variable, "1"
    )  # before torch is imported: a thread does not outlive a fork

import pytest  # noqa: E402

with contextlib.suppress(ImportError):
    import torch  # noqa: F401  (imported once for all children)

ROOT = Path(__file__).parents[1]
CATALOGUE = ROOT / "tests" / "planted"
COPIED = (
    "src",
    "tests",
    "docs",
    "examples",
    "benchmarks",
    "reference",
    "conftest.py",
    "pyproject.toml",
)
PASSED, FAILED = 0, 1  # exit codes of pytest; any other says that it could not run
LIMIT = 600  # seconds; a fault that makes a test hang is found by that


@dataclass(frozen=True)
class Fault:
    """One fault: `old` of `file` becomes `new`; `tests` are files, or ``file::test``, that find it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """Return `text` with this fault; ValueError if its place is not found exactly once."""
        if (times := text.count(self.old)) != 1:
            raise ValueError(f"its text is in {self.file} {times} times, 1 is needed")
        return text.replace(self.old, self.new)

    def fits(self, pattern: str) -> bool:
        """Return whether name or file contains `pattern`, or matches it as a glob."""
        return any(
            pattern in text or fnmatch.fnmatch(text, f"*{pattern}*")
            for text in (self.name, self.file)
        )


@dataclass(frozen=True)
class Trial:
    """What the tests said about a fault: found, missed or void; by which test, in how many seconds."""

    fault: Fault
    outcome: str
    by: str
    seconds: float


def catalogue() -> list[Fault]:
    """Return all faults, by file of the catalogue."""
    return [
        Fault(**{**entry, "tests": tuple(entry["tests"])})
        for page in sorted(CATALOGUE.glob("*.toml"))
        for entry in tomllib.loads(page.read_text(encoding="utf-8"))["fault"]
    ]


def copy_tree(folder: Path, source: Path = ROOT) -> Path:
    """Copy what the tests need into `folder`."""
    for path in source.iterdir():
        if path.is_dir() and path.name in COPIED:
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / path.name)
    return folder


def begin_tests(tree: Path, tests: Sequence[str], log: Path, *options: str) -> int:
    """Begin to run `tests` of `tree` in a child of this process, which has imported torch; return its number."""
    child = os.fork()
    if child:
        return child
    signal.alarm(LIMIT)
    with log.open("w") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree / "src")  # of processes that a test starts
    sys.path[:] = [str(tree / "src"), str(tree / "tests"), *sys.path[1:]]
    arguments = ["-q", "-p", "no:cacheprovider", "--tb=line", "-rfE", *options, *tests]
    code = 4
    try:
        code = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def failed_tests(output: str) -> list[str]:
    """Return the ids of the tests that `output` names as failed."""
    lines = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return [line.split(" ", 1)[1].split(" - ")[0].strip() for line in lines]


def judged(fault: Fault, code: int, output: str, seconds: float) -> Trial:
    """Return what an exit code and an output say about `fault`."""
    if code == -signal.SIGALRM:
        return Trial(fault, "found", f"{fault.tests[0]} (no end after {LIMIT} s)", seconds)
    if code == PASSED:
        return Trial(fault, "missed", "all tests pass: " + " ".join(fault.tests), seconds)
    by = failed_tests(output)
    if code == FAILED and by:
        return Trial(fault, "found", by[0], seconds)
    last = output.strip().splitlines()[-1:] or ["no output"]
    return Trial(fault, "void", f"exit code {code}: {last[0]}", seconds)


class Copies:
    """Copies of the tree, in each of which one fault at a time is tried.

    Bytecode is checked against the source's hash and made once: a planted file is compiled again, the others are not.
    """

    def __init__(self, scratch: Path, jobs: int, source: Path = ROOT) -> None:
        self.free = [copy_tree(scratch / str(place), source) for place in range(jobs)]
        for tree in self.free:
            mode = py_compile.PycInvalidationMode.CHECKED_HASH
            compileall.compile_dir(tree / "src", quiet=2, invalidation_mode=mode)
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        data = os.environ.get("KARIKOMI_DATA") or str(source.parent / "shared" / "data")
        if Path(data).is_dir():
            os.environ["KARIKOMI_DATA"] = data
        self._running: dict[int, tuple[Fault, Path, str, float]] = {}

    def trials(self, faults: Iterable[Fault]) -> Iterator[Trial]:
        """Try each of `faults`; yield what the tests said as they end."""
        for fault in faults:
            while not self.free:
                yield self._ended()
            tree = self.free.pop()
            path = tree / fault.file
            try:
                clean = path.read_text(encoding="utf-8")
                path.write_text(fault.applied(clean), encoding="utf-8")
            except (OSError, ValueError) as error:
                self.free.append(tree)
                yield Trial(fault, "void", str(error), 0.0)
                continue
            child = begin_tests(tree, fault.tests, tree / "log", "-x")
            self._running[child] = (fault, tree, clean, time.monotonic())
        while self._running:
            yield self._ended()

    def _ended(self) -> Trial:
        child, status = os.wait()
        fault, tree, clean, started = self._running.pop(child)
        (tree / fault.file).write_text(clean, encoding="utf-8")
        self.free.append(tree)
        output = (tree / "log").read_text(encoding="utf-8", errors="replace")
        code = os.waitstatus_to_exitcode(status)
        return judged(fault, code, output, time.monotonic() - started)

    def failing_without(self, tests: Sequence[str]) -> set[str]:
        """Return which of `tests` fail where nothing is planted."""
        tree = self.free[0]
        _, status = os.waitpid(begin_tests(tree, tests, tree / "log"), 0)
        output = (tree / "log").read_text(encoding="utf-8", errors="replace")
        if os.waitstatus_to_exitcode(status) not in (PASSED, FAILED):
            return set(tests)
        return set(failed_tests(output))


def try_all(faults: Sequence[Fault], jobs: int, source: Path = ROOT) -> list[Trial]:
    """Try `faults`, `jobs` at a time, each in a copy of its own; print a line for each as it ends."""
    started = time.monotonic()
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="karikomi-faults-") as scratch:
        copies = Copies(Path(scratch), jobs, source)
        for trial in copies.trials(faults):
            trials.append(trial)
            left = (time.monotonic() - started) / len(trials) * (len(faults) - len(trials))
            print(
                f"{len(trials):3}/{len(faults)} {trial.outcome:6} {trial.seconds:4.0f} s  {trial.fault.name}"
                f"  [{trial.by}]  about {left / 60:.0f} min left",
                flush=True,
            )
        by = sorted({trial.by for trial in trials if trial.outcome == "found" and "::" in trial.by})
        without = copies.failing_without(by) if by else set()
    return [
        replace(trial, outcome="void", by=f"{trial.by} fails without the fault as well")
        if trial.by in without
        else trial
        for trial in trials
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("patterns", nargs="*", help="parts of names or files; without one: all")
    parser.add_argument("--jobs", type=int, default=2, help="copies worked on at once (default: 2)")
    parser.add_argument("--list", action="store_true", help="name the faults and end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes to FILE")
    options = parser.parse_args(arguments)
    every = catalogue()
    faults = [
        fault
        for fault in every
        if not options.patterns or any(fault.fits(pattern) for pattern in options.patterns)
    ]
    if not faults:
        parser.error(f"no fault fits {' '.join(options.patterns)}; --list names the {len(every)}")
    if options.list:
        for fault in faults:
            print(f"{fault.name:60} {fault.file:48} {' '.join(fault.tests)}")
        return 0
    started = time.monotonic()
    trials = try_all(faults, options.jobs)
    counts = {
        outcome: sum(trial.outcome == outcome for trial in trials)
        for outcome in ("found", "missed", "void")
    }
    if options.json:
        rows = [
            {
                "name": t.fault.name,
                "file": t.fault.file,
                "outcome": t.outcome,
                "by": t.by,
                "seconds": round(t.seconds, 1),
            }
            for t in trials
        ]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    minutes = (time.monotonic() - started) / 60
    print(
        f"{counts['found']} of {len(trials)} found, {counts['missed']} missed, {counts['void']} void, "
        f"in {minutes:.1f} min"
    )
    return 0 if counts["found"] == len(trials) else 1


if __name__ == "__main__":
    raise SystemExit(main())
