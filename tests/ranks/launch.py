"""Start the ranks of a world as processes of their own, once, and read what they found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

LIMIT = 240.0  # seconds; a rank that waits for another one for ever is a failure


def results(scenarios: str, size: int, factory: pytest.TempPathFactory) -> list[dict]:
    """Return what each rank found, scenario -> facts; workers of one run share one world."""
    base = factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / scenarios
    try:
        folder.mkdir()
    except FileExistsError:
        _wait(folder / "done")
    else:
        try:
            _run(scenarios, size, folder)
        finally:
            (folder / "done").touch()
    written = [folder / f"{rank}.json" for rank in range(size)]
    missing = [path.stem for path in written if not path.exists()]
    if missing:
        pytest.fail(
            f"rank(s) {', '.join(missing)} did not end: {(folder / 'log').read_text()[-4000:]}"
        )
    return [json.loads(path.read_text()) for path in written]


def _run(scenarios: str, size: int, folder: Path) -> None:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent / "src"), str(tests)])
    program = [sys.executable, "-W", "ignore", "-m", "ranks.one_rank", scenarios, str(folder)]
    with (folder / "log").open("w") as log:
        ranks = [
            subprocess.Popen(
                [*program, str(rank), str(size)], env=environment, stdout=log, stderr=log
            )
            for rank in range(size)
        ]
        end = time.monotonic() + LIMIT
        for rank in ranks:
            try:
                rank.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()


def _wait(done: Path) -> None:
    end = time.monotonic() + LIMIT + 30.0
    while not done.exists() and time.monotonic() < end:
        time.sleep(0.2)
