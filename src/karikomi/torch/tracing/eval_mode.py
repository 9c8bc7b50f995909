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
        (one, one.training, getattr(one, "track_running_stats", None)) for one in module.modules()
    ]
    unused = _unused(module) if fresh else []
    try:
        for one, _, _ in before:
            one.training = False
        for one in unused:
            # In training mode without tracking, torch hands no buffers over: they stay as they are.
            one.training, one.track_running_stats = True, False
        yield
    finally:
        for one, training, tracks in before:
            one.training = training
            if tracks is not None:
                one.track_running_stats = tracks  # type: ignore[assignment]


def _unused(module: nn.Module) -> list[_BatchNorm]:
    return [
        one
        for one in module.modules()
        if isinstance(one, _BatchNorm)
        and isinstance(one.running_mean, torch.Tensor)
        and isinstance(one.running_var, torch.Tensor)
        and not bool(one.running_mean.any())
        and bool((one.running_var == 1).all())
    ]
