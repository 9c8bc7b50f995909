"""Keras has one backend per process: a file that imports this one runs again under each of the other backends.

The run that pytest was started for has the backend of the root conftest, torch; ``unit/test_keras_backends.py``
starts one process for each other backend, a lane, in which all of these files run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import pytest

from depth import FULL, turns

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
BACKEND = os.environ.get("KERAS_BACKEND", "torch")
OTHERS = [name for name in ("jax", "tensorflow") if find_spec(name)]
LIMIT = 900.0  # seconds
LANES = "test_keras_backends"


def sampled(values: Iterable[T], *key: object, most: int = 1) -> list[T]:
    """Return all `values` on torch and in a full run, else `most` of them, others on another backend."""
    return turns(list(values), BACKEND, *key, most=most, full=FULL or BACKEND == "torch")


def only(*backends: str) -> Callable:
    """Return a decorator that keeps a test where the backend is one of these, and drops it elsewhere."""

    def keep(test: Callable) -> Callable | None:
        if BACKEND not in backends:
            return None
        test.everywhere = True  # type: ignore[attr-defined]
        return test

    return keep


def slow_on(*backends: str) -> Callable:
    """Return a decorator that leaves a test out of the lanes of these backends, unless the run is full."""

    def note(test: Callable) -> Callable:
        test.slow_on = backends  # type: ignore[attr-defined]
        return test

    return note


def taken(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests of a lane: all in a full run, else each by one of the other backends, in turn."""
    if FULL or "KARIKOMI_LANE" not in os.environ:
        return items

    def here(item: pytest.Item) -> bool:
        test = getattr(item, "function", None)
        if hasattr(test, "everywhere"):
            return True
        quick = [name for name in OTHERS if name not in getattr(test, "slow_on", ())]
        return bool(quick) and turns(quick, item.nodeid.partition("[")[0]) == [BACKEND]

    return [item for item in items if here(item)]


def run_under(backend: str, *arguments: str | Path) -> str:
    """Run pytest with these arguments in a process of its own whose Keras has this backend."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "KARIKOMI_LANE": backend}
    # Of the run around this one, which may itself be a worker.
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"{backend}: {done.stdout[-6000:]}{done.stderr[-2000:]}", pytrace=False)
    return done.stdout


def files_of_every_backend() -> list[Path]:
    """Return the test files that import this one."""
    imports = re.compile(rf"^(from|import) {Path(__file__).stem}\b", re.MULTILINE)
    tests = (path for path in (ROOT / "tests").rglob("test_*.py") if path.stem != LANES)
    return sorted(path for path in tests if imports.search(path.read_text(encoding="utf-8")))


if BACKEND == "tensorflow":  # two CPUs for mirrored replicas; before TensorFlow runs anything
    import tensorflow

    tensorflow.config.set_logical_device_configuration(
        tensorflow.config.list_physical_devices("CPU")[0],
        [tensorflow.config.LogicalDeviceConfiguration()] * 2,
    )
