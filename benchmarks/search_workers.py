"""The same toy search with one and with two processes: `python benchmarks/search_workers.py`.

Both are timed with processes of one thread each, interleaved, several times; the median of the ratios is printed.
Candidates that wait for `--seconds` show what the driver itself costs; those that compute for about as long show no
gain on a machine without two free cores.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import search_toys as toys
from karikomi.search.driver import Evaluate, RunJournal, Workers, drive

RATE = 5.0
"""Million blocks that a core hashes in a second, about; only the ratio is judged."""


def seconds_with(
    workers: int, candidates: int, evaluate: Evaluate, load: float
) -> tuple[float, list[object]]:
    """Return the time of a search once its processes have begun, and its results."""
    with tempfile.TemporaryDirectory() as folder, Workers(workers) as executor:
        started = [executor.submit(os.getpid) for _ in range(workers)]
        for future in started:
            future.result()
        with RunJournal(Path(folder) / "journal.jsonl", {}) as journal:
            start = time.perf_counter()
            found = drive(
                toys.Once(*range(candidates)),
                evaluate,
                journal=journal,
                executor=executor,
                seed=0,
                reference=load,
            )
            taken = time.perf_counter() - start
    return taken, [(p.text, dict(item.facts)) for p, item in found.items()]


def main() -> None:
    """Print the times and their ratio."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--candidates", type=int, default=12)
    options.add_argument("--seconds", type=float, default=0.5)
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
    kinds = {
        "waiting": (toys.asleep, given.seconds),
        "computing": (toys.busy, given.seconds * RATE),
    }
    for kind, (evaluate, load) in kinds.items():
        ratios = []
        for _ in range(given.repeats):
            first, alone = seconds_with(1, given.candidates, evaluate, load)
            second, both = seconds_with(2, given.candidates, evaluate, load)
            assert alone == both, "the results depend on the number of workers"
            ratios.append(second / first)
            print(f"{kind}: one worker {first:6.2f} s, two {second:6.2f} s, ratio {ratios[-1]:.2f}")
        print(f"{kind}: median ratio {statistics.median(ratios):.2f} (asked: at most 0.65)")


if __name__ == "__main__":
    main()
