"""Decide how much of a gradient to keep: one file per rule, discovered on import; no code here uses tensors.

`ByNorm` is per tensor, `ByGlobalNorm` is ``torch.nn.utils.clip_grad_norm_``.
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
