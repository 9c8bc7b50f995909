"""Collectives between the replicas of data-parallel training."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from karikomi.torch.internals import uncompiled


def gathered(module: nn.Module, own: Any) -> list[Any]:
    """Return the objects of all ranks of a data-parallel module, in order of rank; of any other module, `own`.

    A collective; `own` can be pickled and has no tensor on a device.
    """
    every = [own] * replica_count(module)
    if len(every) > 1:
        dist.all_gather_object(every, own, group=_group(module))
    return every


def rank_of(module: nn.Module) -> int:
    """Return the rank of this process among the replicas of a module, 0 where there are no others."""
    return dist.get_rank(_group(module)) if replica_count(module) > 1 else 0


def replica_count(module: nn.Module) -> int:
    """Return the number of replicas of a data-parallel module, 1 for any other module."""
    group = _group(module)
    return 1 if group is None else dist.get_world_size(group)


def _group(module: nn.Module) -> dist.ProcessGroup | None:
    module = uncompiled(module)
    return module.process_group if isinstance(module, nn.parallel.DistributedDataParallel) else None
