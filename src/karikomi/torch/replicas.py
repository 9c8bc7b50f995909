"""Replicas of a module (DDP): what each of them found, and that they find the same masks.

Replicas with different masks drift apart without a word.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch.distributed as dist
from torch import nn

from karikomi.errors import Refused
from karikomi.torch.masks import Masks


def check_replicas(module: nn.Module, masks: Masks) -> None:
    """Raise `Refused`, on every rank, if the ranks of a data-parallel module found different masks."""
    if _count(module) == 1:
        return
    own = 0
    for name, mask in masks.items():
        own = zlib.crc32(mask.cpu().numpy().tobytes(), zlib.crc32(name.encode(), own))
    if len(set(gathered(module, own))) > 1:
        raise Refused(
            "the ranks found different masks, and their replicas would drift apart",
            where="torch.prune_",
            hint="give every rank the same data=, or prune before wrapping and load the masks on each",
        )


def gathered(module: nn.Module, own: Any) -> list[Any]:
    """Return what every rank of a data-parallel module gives, in their order; of any other module, `own`.

    All ranks call, with what can be pickled and lies on no device.
    """
    every = [own] * _count(module)
    if len(every) > 1:
        dist.all_gather_object(every, own, group=_group(module))
    return every


def rank_of(module: nn.Module) -> int:
    """Return the rank of this process among the replicas of a module, 0 where there are no others."""
    return dist.get_rank(_group(module)) if _count(module) > 1 else 0


def _count(module: nn.Module) -> int:
    group = _group(module)
    return 1 if group is None else dist.get_world_size(group)


def _group(module: nn.Module) -> dist.ProcessGroup | None:
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        module = inner
    return module.process_group if isinstance(module, nn.parallel.DistributedDataParallel) else None
