"""Start the ranks of a world, once, and read what they found."""

from __future__ import annotations

import json
import os
import signal
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
        world = subprocess.Popen(
            [*program, str(size)], env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            world.wait(LIMIT)
        except subprocess.TimeoutExpired:
            _kill(world)


def _kill(world: subprocess.Popen) -> None:
    """End a world and its ranks, which are of one session."""
    if hasattr(os, "killpg"):
        os.killpg(world.pid, signal.SIGKILL)
    world.kill()
    world.wait()


def _wait(done: Path) -> None:
    end = time.monotonic() + LIMIT + 30.0
    while not done.exists() and time.monotonic() < end:
        time.sleep(0.2)
