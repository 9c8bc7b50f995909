"""Whether a change made anything slower: the same benchmarks at another commit and here, in turn.

``python benchmarks/against_commit.py REV`` checks REV out beside the working tree and runs each benchmark there
and here alternately. Compared is what each benchmark compares itself: its time over that of its peer in the same
process, so that a slow moment of the machine hits both. Printed are medians over the rounds and after / before.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Parse = Callable[[str], dict[str, float]]


def clip_overhead(text: str) -> dict[str, float]:
    """Return comparison -> ratio of the table of ``clip_overhead.py``."""
    rows = re.findall(r"^(\S.*?\S)\s+[\d.]+\s+[\d.]+\s+([\d.]+)(?:\s|$)", text, re.MULTILINE)
    return {re.sub(r"\s+", " ", name): float(ratio) for name, ratio in rows}


def selection(text: str) -> dict[str, float]:
    """Return way -> the seconds of the first way, which is ours, over its own, from ``selection.py``."""
    rows = re.findall(r"^(\S.*?\S)\s+([\d.]+) s\s+x", text, re.MULTILINE)
    (_, own), *others = [(name, float(number)) for name, number in rows]
    return {f"over {name}": own / number for name, number in others}


def masked_step(text: str) -> dict[str, float]:
    """Return comparison -> ratio, from ``masked_step.py``."""
    rows = re.findall(r"^(masked step / .+?)\s+([\d.]+)\s", text, re.MULTILINE)
    return {name: float(ratio) for name, ratio in rows}


BENCHMARKS = {
    "clip_overhead.py": (["--rounds", "7"], clip_overhead),
    "selection.py": (["--rounds", "1"], selection),
    "masked_step.py": (["--rounds", "10"], masked_step),
}


def run(tree: Path, name: str, options: list[str]) -> str:
    """Return what a benchmark of a tree prints, run with that tree's sources."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    command = [sys.executable, str(tree / "benchmarks" / name), *options]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return done.stdout


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rev", help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=BENCHMARKS, help="one benchmark")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "-q", "--detach", str(before), options.rev], check=True)
        try:
            print(f"{'':58}{'before':>8}{'here':>8}{'ratio':>8}")
            for name, (arguments, parse) in BENCHMARKS.items():
                if options.only in (None, name):
                    compare(before, name, arguments, parse, options.rounds)
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)


def compare(before: Path, name: str, arguments: list[str], parse: Parse, rounds: int) -> None:
    """Print the rows of one benchmark."""
    runs: list[tuple[dict[str, float], dict[str, float]]] = []
    for turn in range(rounds):
        trees = (before, ROOT) if turn % 2 == 0 else (ROOT, before)
        found = {tree: parse(run(tree, name, arguments)) for tree in trees}
        runs.append((found[before], found[ROOT]))
    print(name)
    for case in runs[0][1]:
        old = statistics.median(pair[0][case] for pair in runs)
        new = statistics.median(pair[1][case] for pair in runs)
        print(f"  {case:56}{old:8.3f}{new:8.3f}{new / old:8.2f}", flush=True)


if __name__ == "__main__":
    main()
