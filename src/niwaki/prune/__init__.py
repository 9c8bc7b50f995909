"""Decide what goes: score, allocation, pattern, target, schedule, masks; nothing here touches a model.

A framework folder measures facts and hands its weights over in blocks; what stands here says what they
are worth, how many go from where, and turns counts into a threshold.
"""

from __future__ import annotations

from niwaki import registry
from niwaki.prune.allocation import Pool, Tensor, allocate, check_sparsity
from niwaki.prune.dynamic import SET, RigL
from niwaki.prune.gradient_scores import SNIP, Fisher, GraSP, Movement, SynFlow, Taylor
from niwaki.prune.gradual import Gradual
from niwaki.prune.input_scores import Wanda
from niwaki.prune.iterative import Iterative
from niwaki.prune.lamp import LAMP
from niwaki.prune.layout import Coupled, Layout, Member
from niwaki.prune.mask import pack_mask, unpack_mask
from niwaki.prune.one_shot import OneShot
from niwaki.prune.output_scores import Activation, APoZ, BNScale, Deviation
from niwaki.prune.owl import outlier_share
from niwaki.prune.pattern import (
    Blocks,
    Heads,
    Layers,
    NofM,
    Pattern,
    Units,
    Unstructured,
    as_pattern,
)
from niwaki.prune.penalties import L1, GroupLasso, GrowingL2, ScaleL1
from niwaki.prune.penalty_terms import Penalty
from niwaki.prune.random_scores import Random
from niwaki.prune.reconstruction_scores import OBC, SparseGPT
from niwaki.prune.score import FACTS, Score, as_score
from niwaki.prune.selection import Threshold, threshold
from niwaki.prune.target import Target, target_of
from niwaki.prune.timetable import Timetable
from niwaki.prune.weight_scores import FPGM, L2Norm, Magnitude

__all__ = [
    "APoZ",
    "Activation",
    "BNScale",
    "Blocks",
    "Coupled",
    "Deviation",
    "FACTS",
    "FPGM",
    "Fisher",
    "GraSP",
    "Gradual",
    "GroupLasso",
    "GrowingL2",
    "Heads",
    "Iterative",
    "L1",
    "L2Norm",
    "LAMP",
    "Layers",
    "Layout",
    "Magnitude",
    "Member",
    "Movement",
    "NofM",
    "OBC",
    "OneShot",
    "Pattern",
    "Penalty",
    "Pool",
    "Random",
    "RigL",
    "SET",
    "SNIP",
    "ScaleL1",
    "Score",
    "SparseGPT",
    "SynFlow",
    "Target",
    "Taylor",
    "Tensor",
    "Threshold",
    "Timetable",
    "Units",
    "Unstructured",
    "Wanda",
    "allocate",
    "as_pattern",
    "as_score",
    "check_sparsity",
    "outlier_share",
    "pack_mask",
    "target_of",
    "threshold",
    "unpack_mask",
]

# Every file of this folder is imported, so that a new score or allocation is found by itself.
registry.discover(__name__, __path__, "allocation")
