"""Keras has one backend per process: run a test file again, in a process for each of the other backends.

A file whose tests hold on every backend ends with ``test_other_backends = other_backends(__file__)``. The run
that pytest was started for has the backend of the root conftest, torch; the others run the same file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BACKEND = os.environ.get("KERAS_BACKEND", "torch")
OTHERS = [name for name in ("jax", "tensorflow") if find_spec(name)]
LIMIT = 300.0  # seconds
_INSIDE = "KARIKOMI_KERAS_LANE"


def only(*backends: str) -> Callable:
    """Return a decorator that keeps a test where the backend is one of these, and drops it elsewhere."""

    def keep(test: Callable) -> Callable | None:
        return test if BACKEND in backends else None

    return keep


def run_under(backend: str, *arguments: str | Path) -> str:
    """Run pytest with these arguments in a process of its own whose Keras has this backend."""
    environment = {**os.environ, "KERAS_BACKEND": backend, _INSIDE: "1"}
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


def other_backends(file: str) -> Callable[[str], None] | None:
    """Return a test that runs a file under each of the other backends; nothing inside of such a run."""
    if os.environ.get(_INSIDE):
        return None

    @pytest.mark.parametrize("backend", OTHERS)
    def test(backend: str) -> None:
        run_under(backend, file)

    return test


def two_devices() -> None:
    """Let TensorFlow see two CPUs, if it is the backend; before anything else is asked of it."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
