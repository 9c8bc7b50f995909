"""Clip gradients and bound weights held as NumPy arrays: the readable reference for all frameworks."""

from niwaki.numpy.apply import bound, clip

__all__ = ["bound", "clip"]
