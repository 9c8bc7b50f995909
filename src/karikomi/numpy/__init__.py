"""Clip gradients, bound, prune and quantize weights held as NumPy arrays: the readable reference for all frameworks."""

from karikomi.numpy.bounding import bound
from karikomi.numpy.clipping import clip
from karikomi.numpy.penalties import penalty
from karikomi.numpy.per_example import clip_examples
from karikomi.numpy.pruning import masked, prune, scores
from karikomi.numpy.quantizing import decode, quantize
from karikomi.numpy.safetensors_pruning import FileReport, prune_file
from karikomi.numpy.scheduled_pruning import prune_at

__all__ = [
    "FileReport",
    "bound",
    "clip",
    "clip_examples",
    "decode",
    "masked",
    "penalty",
    "prune",
    "prune_at",
    "prune_file",
    "quantize",
    "scores",
]
