"""Clip gradients and bound weights held as NumPy arrays: the readable reference for all frameworks."""

from niwaki.numpy.gradients import clip
from niwaki.numpy.weights import bound

__all__ = ["bound", "clip"]
