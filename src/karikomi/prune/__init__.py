"""Decide what is pruned: scores, allocations, patterns, targets, schedules; nothing here touches a model."""

from __future__ import annotations

from karikomi import registry
from karikomi.prune.allocations.allocation import (
    Allocation,
    Allocator,
    Pool,
    Tensor,
    allocate,
    check_sparsity,
)
from karikomi.prune.allocations.erk import ERK
from karikomi.prune.allocations.fixed import Fixed
from karikomi.prune.allocations.lamp import LAMP
from karikomi.prune.allocations.owl import outlier_share
from karikomi.prune.facts import FACTS
from karikomi.prune.importances import Importances
from karikomi.prune.layout import Coupled, Layout, Member
from karikomi.prune.mask_bits import pack_mask, unpack_mask
from karikomi.prune.pattern import (
    Blocks,
    Heads,
    Layers,
    NofM,
    Pattern,
    Units,
    Unstructured,
    as_pattern,
)
from karikomi.prune.penalties.penalty import Penalty
from karikomi.prune.penalties.rules import L1, L2, GroupLasso, GrowingL2, ScaleL1
from karikomi.prune.radix_threshold import Threshold, threshold
from karikomi.prune.schedules.dynamic import SET, RigL
from karikomi.prune.schedules.gradual import Gradual
from karikomi.prune.schedules.iterative import Iterative
from karikomi.prune.schedules.one_shot import OneShot
from karikomi.prune.schedules.pruning_schedule import PruningSchedule, Timetable
from karikomi.prune.scores.gradients import SNIP, Fisher, GraSP, Movement, SynFlow, Taylor
from karikomi.prune.scores.importance import Importance
from karikomi.prune.scores.inputs import Wanda
from karikomi.prune.scores.outputs import Activation, APoZ, BNScale, Deviation
from karikomi.prune.scores.random import Random
from karikomi.prune.scores.reconstruction import OBC, SparseGPT
from karikomi.prune.scores.score import Score, as_score
from karikomi.prune.scores.weights import FPGM, L2Norm, Magnitude
from karikomi.prune.target import Target, target_of

__all__ = [
    "APoZ",
    "Activation",
    "Allocation",
    "Allocator",
    "BNScale",
    "Blocks",
    "Coupled",
    "Deviation",
    "ERK",
    "FACTS",
    "FPGM",
    "Fisher",
    "Fixed",
    "GraSP",
    "Gradual",
    "GroupLasso",
    "GrowingL2",
    "Heads",
    "Importance",
    "Importances",
    "Iterative",
    "L1",
    "L2",
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
    "PruningSchedule",
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
