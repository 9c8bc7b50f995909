"""Eval mode for the time of a measurement, with all modes restored afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from karikomi.torch.internals import batch_norm_type

Judge = Callable[[nn.Module], float]
"""A validation metric that decides whether a change is kept."""


@contextmanager
def steady(module: nn.Module, *, fresh: bool = True) -> Iterator[None]:
    """Set all submodules to eval mode for the block, and restore the mode of each afterwards.

    `fresh`: a batch norm with initial statistics (mean 0, variance 1), as in a network scored at
    initialisation, normalises by each batch, as in training, without updating its statistics: those that
    eval mode would use were never estimated.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> with steady(net):
    ...     net[1].training
    False
    >>> net[1].training
    True
    """
    before = [
        (item, item.training, getattr(item, "track_running_stats", None))
        for item in module.modules()
    ]
    unused = _unused(module) if fresh else []
    try:
        for previous, _, _ in before:
            previous.training = False
        for previous in unused:
            # In training mode without tracking, torch does not update the buffers.
            previous.training, previous.track_running_stats = True, False
        yield
    finally:
        for previous, training, tracks in before:
            previous.training = training
            if tracks is not None:
                previous.track_running_stats = tracks  # type: ignore[assignment]


def _unused(module: nn.Module) -> list[Any]:
    return [
        item
        for item in module.modules()
        if isinstance(item, batch_norm_type())
        and isinstance(item.running_mean, torch.Tensor)
        and isinstance(item.running_var, torch.Tensor)
        and not bool(item.running_mean.any())
        and bool((item.running_var == 1).all())
    ]
