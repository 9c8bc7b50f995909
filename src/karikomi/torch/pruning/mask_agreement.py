"""Replicas of a module (DDP): what each of them found, and that they find the same masks.

Replicas with different masks drift apart without a word.
"""

from __future__ import annotations

import zlib

from torch import nn

from karikomi.errors import Unsupported
from karikomi.torch.distributed.replicas import _count, gathered
from karikomi.torch.pruning.masks import Masks


def check_replicas(module: nn.Module, masks: Masks) -> None:
    """Raise `Unsupported`, on every rank, if the ranks of a data-parallel module found different masks."""
    if _count(module) == 1:
        return
    own = 0
    for name, mask in masks.items():
        own = zlib.crc32(mask.cpu().numpy().tobytes(), zlib.crc32(name.encode(), own))
    if len(set(gathered(module, own))) > 1:
        raise Unsupported(
            "the ranks found different masks, and their replicas would drift apart",
            where="torch.prune_",
            hint="give every rank the same data=, or prune before wrapping and load the masks on each",
        )
