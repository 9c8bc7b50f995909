"""What ``karikomi --version --json`` prints: the facts about an installation that a bug report needs."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from karikomi import __version__
from karikomi.selection.threads import workers

PACKAGES = (
    "numpy",
    "array-api-compat",
    "safetensors",
    "torch",
    "keras",
    "tensorflow",
    "tensorflow-cpu",
    "jax",
    "optax",
)
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
)


def installation() -> dict[str, Any]:
    """Return versions, platform, processor and threads; no framework is imported.

    ``cores``: of the machine. ``threads``: the number that pruning uses. ``thread_variables``: the
    environment variables that limit threads, if set. ``packages``: name -> version, None if not installed.
    """
    return {
        "karikomi": __version__,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": workers(),
        "thread_variables": {
            name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ
        },
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    # On Linux `platform.processor` repeats the architecture or is empty.
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            models = (line.partition(":")[2].strip() for line in lines if "model name" in line)
            return next(models, "") or platform.processor()
    except OSError:
        return platform.processor()
