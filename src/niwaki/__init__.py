"""niwaki: gradient clipping, weight bounds, pruning, shrinking, quantization and packing, measured.

The front door. Every public name is loaded on first use, and nothing here imports a framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from niwaki import audit as audit
    from niwaki import bound as bound
    from niwaki import clip as clip
    from niwaki import errors as errors
    from niwaki import jax as jax
    from niwaki import keras as keras
    from niwaki import numpy as numpy
    from niwaki import pack as pack
    from niwaki import plugins as plugins
    from niwaki import prune as prune
    from niwaki import quantize as quantize
    from niwaki import record as record
    from niwaki import registry as registry
    from niwaki import report as report
    from niwaki import rule as rule
    from niwaki import schedule as schedule
    from niwaki import select as select
    from niwaki import shrink as shrink
    from niwaki import spec as spec
    from niwaki import tasks as tasks
    from niwaki import torch as torch
    from niwaki.errors import NiwakiError as NiwakiError
    from niwaki.outcome import Outcome as Outcome
    from niwaki.pack.models import load as load
    from niwaki.pack.models import save as save
    from niwaki.search import compress as compress
    from niwaki.search import sweep as sweep

_FOLDERS = (
    "audit bound clip errors jax keras numpy pack plugins prune quantize record registry report rule schedule"
    " select shrink spec tasks torch"
).split()
_NAMES = {
    "NiwakiError": "niwaki.errors",
    "Outcome": "niwaki.outcome",
    "compress": "niwaki.search",
    "load": "niwaki.pack.models",
    "save": "niwaki.pack.models",
    "sweep": "niwaki.search",
}

__all__ = [*_FOLDERS, *_NAMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in ("torch", "jax", "keras"):
        # Through the registry, which says how to install a framework that is missing.
        from niwaki import registry

        return registry.framework(name)
    if name in _FOLDERS:
        return importlib.import_module(f"niwaki.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    from niwaki.errors import suggest

    raise AttributeError(f"niwaki has no {name!r}; {suggest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
