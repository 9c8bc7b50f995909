"""Certificates of a budget: bounds on the paired drop, on examples that no choice was made on.

Pure arithmetic on counts and on one number per example: no framework, no file, no clock.
"""

from __future__ import annotations

from karikomi.search.certificate.early_decision import Examined, examined
from karikomi.search.certificate.example_identity import example_ids, overlap
from karikomi.search.certificate.fitting_bound import PairedDrop, paired_drop
from karikomi.search.certificate.flips import Flips, drop_bound, flip_bound
from karikomi.search.certificate.in_sequence import Certified, DropBound, fixed_sequence
from karikomi.search.certificate.paired_means import mean_bound, mean_needed
from karikomi.search.certificate.safe_to_bold import Found, handful
from karikomi.search.certificate.sample_size import (
    Feasibility,
    feasibility,
    least,
    needed,
    power,
    smallest_budget,
)
from karikomi.search.certificate.spent_ids import SpentIds
from karikomi.tasks.splits import partition

__all__ = [
    "Certified",
    "Examined",
    "Feasibility",
    "Flips",
    "Found",
    "PairedDrop",
    "SpentIds",
    "DropBound",
    "drop_bound",
    "example_ids",
    "examined",
    "feasibility",
    "fixed_sequence",
    "flip_bound",
    "handful",
    "least",
    "mean_bound",
    "mean_needed",
    "needed",
    "overlap",
    "paired_drop",
    "partition",
    "power",
    "smallest_budget",
]
