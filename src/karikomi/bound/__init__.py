"""Decide where a weight must stay: one file per bound, discovered on import; no code here uses tensors."""

from __future__ import annotations

from typing import Any

from karikomi import registry
from karikomi.errors import suggest

_rules = registry.discover(__name__, __path__, "bound")
globals().update(_rules)
__all__ = sorted(_rules)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"karikomi.bound has no rule {name!r}; {suggest(name, __all__)}")
