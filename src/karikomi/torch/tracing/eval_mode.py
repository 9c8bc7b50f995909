"""A network held still while it is measured: the same answer for the same input, and no trace left.

Separate from what is measured: every fact is measured like this, and restoring must hold after errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def steady(module: nn.Module, *, fresh: bool = True) -> Iterator[None]:
    """Hold all submodules in eval mode for the block, and put each back into its own mode afterwards.

    `fresh`: a batch norm whose statistics are still those it was made with (mean 0, variance 1)
    normalises by each batch meanwhile, as in training, and learns nothing from it: what it would use
    in eval mode was never estimated. A network scored at initialisation is one such.

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
            # In training mode without tracking, torch hands no buffers over: they stay as they are.
            previous.training, previous.track_running_stats = True, False
        yield
    finally:
        for previous, training, tracks in before:
            previous.training = training
            if tracks is not None:
                previous.track_running_stats = tracks  # type: ignore[assignment]


def _unused(module: nn.Module) -> list[_BatchNorm]:
    return [
        item
        for item in module.modules()
        if isinstance(item, _BatchNorm)
        and isinstance(item.running_mean, torch.Tensor)
        and isinstance(item.running_var, torch.Tensor)
        and not bool(item.running_mean.any())
        and bool((item.running_var == 1).all())
    ]
