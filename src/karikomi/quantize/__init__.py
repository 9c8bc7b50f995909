"""Decide the grid: from float weights to integer codes and the numbers they refer to."""

from __future__ import annotations

from karikomi import registry
from karikomi.quantize.grids import Codebook, Coded, Grid, UniformGrid
from karikomi.quantize.kmeans_codebook import kmeans
from karikomi.quantize.nearest import uniform
from karikomi.quantize.quantizer import OutputUnits, Quantizer, quantizer_for
from karikomi.quantize.rate_goal import RateGoal
from karikomi.quantize.rate_model import RateModel

__all__ = [
    "Codebook",
    "Coded",
    "Grid",
    "OutputUnits",
    "Quantizer",
    "RateGoal",
    "RateModel",
    "UniformGrid",
    "kmeans",
    "quantizer_for",
    "uniform",
]

# Every file of this folder is imported, so that a new quantizer is registered.
registry.discover(__name__, __path__, "quantizer")
