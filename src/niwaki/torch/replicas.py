"""Replicas of a module (DDP) have to find the same masks, or they drift apart without a word."""

from __future__ import annotations

import zlib

import torch.distributed as dist
from torch import nn

from niwaki.errors import Refused
from niwaki.torch.masks import Masks


def check_replicas(module: nn.Module, masks: Masks) -> None:
    """Raise `Refused`, on every rank, if the ranks of a data-parallel module found different masks."""
    if not isinstance(module, nn.parallel.DistributedDataParallel):
        return
    group = module.process_group
    if dist.get_world_size(group) == 1:
        return
    own = 0
    for name, mask in masks.items():
        own = zlib.crc32(mask.cpu().numpy().tobytes(), zlib.crc32(name.encode(), own))
    every: list[int | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, own, group=group)
    if len(set(every)) > 1:
        raise Refused(
            "the ranks found different masks, and their replicas would drift apart",
            where="torch.prune_",
            hint="give every rank the same data=, or prune before wrapping and load the masks on each",
        )
