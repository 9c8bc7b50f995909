"""Say that a copy of an attached optimizer has no handle: torch copies and pickles optimizers without their hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


class WatchedDefaults(dict[str, Any]):
    """The defaults of an attached optimizer, which are copied with it: a copy is a plain dict, and warns."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Warn, and reduce to a plain dict; `copy.deepcopy` and pickle call this."""
        warnings.warn(
            "karikomi: this optimizer is copied or pickled, which loses hooks: the copy has no handle, and its steps "
            "are neither clipped nor bounded nor masked; attach to the copy, and load handle.state_dict() there",
            stacklevel=2,
        )
        return dict, (dict(self),)


def watch_copies(optimizer: torch.optim.Optimizer) -> None:
    """Warn of copies of this optimizer from now on."""
    optimizer.defaults = WatchedDefaults(optimizer.defaults)


def unwatch_copies(optimizer: torch.optim.Optimizer) -> None:
    """Warn of copies no longer."""
    optimizer.defaults = dict(optimizer.defaults)
