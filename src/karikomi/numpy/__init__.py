"""Clip gradients, bound and prune weights held as NumPy arrays: the readable reference for all frameworks."""

from karikomi.numpy.gradients import clip
from karikomi.numpy.masks import masked, prune
from karikomi.numpy.penalties import penalty
from karikomi.numpy.scheduling import prune_at
from karikomi.numpy.streaming import FileReport, prune_file
from karikomi.numpy.weights import bound

__all__ = [
    "FileReport",
    "bound",
    "clip",
    "masked",
    "penalty",
    "prune",
    "prune_at",
    "prune_file",
]
