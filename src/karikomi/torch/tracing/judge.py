"""A validation metric as a callable that decides whether a change is kept."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Judge = Callable[[nn.Module], float]
