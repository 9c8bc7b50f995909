"""Plant faults in a copy of the tree, one at a time, and see that the tests find each of them.

    python tests/faults.py                      # all of them
    python tests/faults.py sweep 'audit/*'      # those whose name or file fits a pattern
    python tests/faults.py --list

The faults stand in ``tests/planted/*.toml``: a file, the text that is there, the text that replaces it, and
the tests that must find it. A fault is *found* if one of these tests fails with it and passes without it.
It is *missed* if all of them pass; *void* if its text is not in its file exactly once, or if nothing could be run.
The checkout itself is never changed. The exit code is 1 unless every fault was found.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

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


def copy_tree(folder: Path) -> Path:
    """Copy what the tests need into `folder`, beside a link to the real data."""
    tree = folder / "tree"
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy2(source, tree / name)
    for path in ROOT.iterdir():  # the pages and settings that layout tests and blocks read
        if path.is_file() and not (tree / path.name).exists():
            shutil.copy2(path, tree / path.name)
    return tree


def run_tests(tree: Path, tests: list[str], *options: str) -> tuple[int, str]:
    """Run `tests` in `tree`; return the exit code of pytest and its output."""
    data = os.environ.get("KARIKOMI_DATA") or str(ROOT.parent / "shared" / "data")
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",
        **({"KARIKOMI_DATA": data} if Path(data).is_dir() else {}),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-rfE"]
    try:
        run = subprocess.run(
            [*command, *options, *tests],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return FAILED, f"FAILED {tests[0]} - no end after {LIMIT} s"
    return run.returncode, run.stdout + run.stderr


def failed_test(output: str) -> str:
    """Return the id of the first test that `output` names as failed, else an empty text."""
    for line in output.splitlines():
        if line.startswith(("FAILED ", "ERROR ")):
            return line.split(" ", 1)[1].split(" - ")[0].strip()
    return ""


def tried(fault: Fault, tree: Path) -> Trial:
    """Plant `fault` in `tree`, run its tests, and take it out again."""
    started = time.monotonic()
    path = tree / fault.file

    def trial(outcome: str, by: str) -> Trial:
        return Trial(fault, outcome, by, time.monotonic() - started)

    try:
        clean = path.read_text(encoding="utf-8")
        planted = fault.applied(clean)
    except (OSError, ValueError) as error:
        return trial("void", str(error))
    path.write_text(planted, encoding="utf-8")
    try:
        code, output = run_tests(tree, list(fault.tests), "-x")
    finally:
        path.write_text(clean, encoding="utf-8")
    if code == PASSED:
        return trial("missed", "all tests pass: " + " ".join(fault.tests))
    by = failed_test(output)
    if code != FAILED or not by:
        return trial(
            "void", output.strip().splitlines()[-1] if output.strip() else f"exit code {code}"
        )
    if "::" in by and run_tests(tree, [by])[0] != PASSED:
        return trial("void", f"{by} fails without the fault as well")
    return trial("found", by)


def try_all(faults: list[Fault], jobs: int) -> list[Trial]:
    """Try `faults`, `jobs` at a time, each in a copy of its own; print a line for each as it ends."""
    started = time.monotonic()
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="karikomi-faults-") as scratch:
        free: SimpleQueue[Path] = SimpleQueue()
        for place in range(jobs):
            folder = Path(scratch) / str(place)
            folder.mkdir()
            free.put(copy_tree(folder))

        def try_one(fault: Fault) -> None:
            tree = free.get()
            try:
                trial = tried(fault, tree)
            finally:
                free.put(tree)
            trials.append(trial)
            left = (time.monotonic() - started) / len(trials) * (len(faults) - len(trials))
            print(
                f"{len(trials):3}/{len(faults)} {trial.outcome:6} {trial.seconds:4.0f} s  {fault.name}"
                f"  [{trial.by}]  about {left / 60:.0f} min left",
                flush=True,
            )

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(try_one, faults))
    return trials


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
