"""The same sweep with one process and with two, one of them killed, then all: ``python benchmarks/sweep_workers.py``.

Twenty settings of `digits` (ten limits, two learning rates). Printed: whether the results are equal to the bit, times
excepted, after a worker and then the whole sweep were ended by SIGKILL and the same command went on; and the
wall-clock time of the runs with two workers over that with one, with the processor seconds and the load beside it. On a
machine without two free cores the ratio shows the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMITS = "0.01,0.03,0.1,0.3,1,3,10,30,100,inf"
TIMES = ("ms_per_step", "ms", "seconds_to_target")
PROGRAM = "from karikomi.cli.app import main; main(prog_name='karikomi')"


def command(out: Path, workers: int, given: argparse.Namespace) -> list[str]:
    """Return the command of a sweep."""
    options = [
        "--limits",
        given.limits,
        "--sparsities",
        "0",
        "--rates",
        "0.001,0.004",
        "--epochs",
        str(given.epochs),
    ]
    options += ["--seeds", str(given.seeds), "--workers", str(workers), "--out", str(out)]
    return [sys.executable, "-c", PROGRAM, "sweep", "digits", *options, "--quiet"]


def runs_of(out: Path) -> int:
    """Return how many runs are in the journal."""
    path = out / "journal.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else 0


def result(out: Path) -> dict[str, Any]:
    """Return the result without times."""
    found = json.loads((out / "sweep.json").read_text())
    points = [{k: v for k, v in point.items() if k not in TIMES} for point in found["points"]]
    return {**found, "points": points}


def until(out: Path, runs: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the journal has so many runs."""
    while runs_of(out) < runs:
        if process.poll() is not None:
            raise SystemExit("the sweep ended too early")
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Return the worker processes of a process (Linux)."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_text() for child in found}
    return [child for child, text in commands.items() if "spawn_main" in text]


def timed(arguments: list[str]) -> tuple[float, float]:
    """Run a command, and return its wall-clock and its processor seconds, with those of its workers."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, used


def main() -> None:
    """Print what is equal, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--limits", default=LIMITS)
    given = parser.parse_args()
    total = 2 * len(given.limits.split(",")) * given.seeds
    few, many = max(total // 7, 1), max(2 * total // 5, 2)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone, alone_used = timed(command(folder / "one", 1, given))
        print(f"one process: {alone:.1f} s, {alone_used:.1f} of a processor", flush=True)
        both, both_used = timed(command(folder / "two", 2, given))
        print(f"two workers: {both:.1f} s, {both_used:.1f} of a processor", flush=True)
        print(f"{both / alone:.2f} of the time (asked 0.65), load {os.getloadavg()[0]:.1f}")
        wanted = result(folder / "one")
        print(f"equal to the bit: {result(folder / 'two') == wanted}", flush=True)
        out = folder / "killed"
        with subprocess.Popen(command(out, 2, given), stdout=subprocess.DEVNULL) as process:
            until(out, few, process)
            os.kill(children(process.pid)[0], signal.SIGKILL)
            until(out, many, process)
            process.kill()
        done = runs_of(out)
        timed(command(out, 2, given))
        print(
            f"a worker killed after {few} runs, all killed after {done}, continued by the same command: "
            f"equal {result(out) == wanted}, {runs_of(out)} runs in the journal"
        )


if __name__ == "__main__":
    main()
