"""Decide which weights go: schedule, allocation, selection, masks; nothing here touches a tensor.

A framework folder computes scores and counts them; what stands here turns counts into a threshold.
"""

from __future__ import annotations

from niwaki.prune.allocation import Pool, allocate, check_sparsity
from niwaki.prune.gradual import Gradual
from niwaki.prune.mask import pack_mask, unpack_mask
from niwaki.prune.score import magnitude
from niwaki.prune.selection import Threshold, threshold

__all__ = [
    "Gradual",
    "Pool",
    "Threshold",
    "allocate",
    "check_sparsity",
    "magnitude",
    "pack_mask",
    "threshold",
    "unpack_mask",
]
