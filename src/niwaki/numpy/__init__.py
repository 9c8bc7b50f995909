"""Clip gradients, bound and prune weights held as NumPy arrays: the readable reference for all frameworks."""

from niwaki.numpy.gradients import clip
from niwaki.numpy.masks import masked, prune
from niwaki.numpy.penalties import penalty
from niwaki.numpy.scheduling import prune_at
from niwaki.numpy.streaming import FileReport, prune_file
from niwaki.numpy.weights import bound

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
