"""Decide how much of a gradient to keep: one file a rule, found by itself, nothing here touches a tensor.

`ByNorm` is per tensor, `ByGlobalNorm` is what ``torch.nn.utils.clip_grad_norm_`` does.
"""

from __future__ import annotations

from typing import Any

from karikomi import registry
from karikomi.errors import suggest

_rules = registry.discover(__name__, __path__, "clip")
globals().update(_rules)
__all__ = sorted(_rules)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"karikomi.clip has no rule {name!r}; {suggest(name, __all__)}")
