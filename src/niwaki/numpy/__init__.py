"""Clip gradients, bound and prune weights held as NumPy arrays: the readable reference for all frameworks."""

from niwaki.numpy.gradients import clip
from niwaki.numpy.masks import masked, prune
from niwaki.numpy.weights import bound

__all__ = ["bound", "clip", "masked", "prune"]
