"""karikomi: gradient clipping, weight bounds, pruning, shrinking, quantization and packing, measured.

The front door. Every public name is loaded on first use, and nothing here imports a framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from karikomi import advising as advising
    from karikomi import audit as audit
    from karikomi import bound as bound
    from karikomi import clip as clip
    from karikomi import errors as errors
    from karikomi import jax as jax
    from karikomi import keras as keras
    from karikomi import numpy as numpy
    from karikomi import pack as pack
    from karikomi import plugins as plugins
    from karikomi import prune as prune
    from karikomi import quantize as quantize
    from karikomi import record as record
    from karikomi import registry as registry
    from karikomi import report as report
    from karikomi import rule as rule
    from karikomi import schedule as schedule
    from karikomi import select as select
    from karikomi import shrink as shrink
    from karikomi import spec as spec
    from karikomi import tasks as tasks
    from karikomi import torch as torch
    from karikomi.advising import advise as advise
    from karikomi.errors import KarikomiError as KarikomiError
    from karikomi.pack.models import load as load
    from karikomi.pack.models import save as save
    from karikomi.rules.outcome import Outcome as Outcome
    from karikomi.search import compress as compress
    from karikomi.search import sweep as sweep

_FOLDERS = (
    "advising audit bound clip errors jax keras numpy pack plugins prune quantize record registry report rule"
    " schedule select shrink spec tasks torch"
).split()
_NAMES = {
    "KarikomiError": "karikomi.errors",
    "advise": "karikomi.advising",
    "Outcome": "karikomi.rules.outcome",
    "compress": "karikomi.search",
    "load": "karikomi.pack.models",
    "save": "karikomi.pack.models",
    "sweep": "karikomi.search",
}

__all__ = [*_FOLDERS, *_NAMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in ("torch", "jax", "keras"):
        # Through the registry, which says how to install a framework that is missing.
        from karikomi import registry

        return registry.framework(name)
    if name in _FOLDERS:
        return importlib.import_module(f"karikomi.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    from karikomi.errors import suggest

    raise AttributeError(f"karikomi has no {name!r}; {suggest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
