"""Decide the grid: from float weights to integer codes and the numbers they refer to."""

from __future__ import annotations

from karikomi import registry
from karikomi.quantize.adaround import AdaRound
from karikomi.quantize.affine import AffineGrid
from karikomi.quantize.cerwu import CERWU
from karikomi.quantize.grids import Codebook, Coded, Grid, UniformGrid
from karikomi.quantize.kmeans_codebook import KMeansQuantizer, kmeans
from karikomi.quantize.nearest import UniformQuantizer, uniform
from karikomi.quantize.octave_grid import OctaveGrid, octaves
from karikomi.quantize.quantizer import Quantizer, quantizer_for
from karikomi.quantize.rate_goal import RateGoal
from karikomi.quantize.rate_model import RateModel
from karikomi.quantize.second_order import GPTQ
from karikomi.quantize.units import OutputUnits

__all__ = [
    "AdaRound",
    "AffineGrid",
    "CERWU",
    "Codebook",
    "Coded",
    "GPTQ",
    "Grid",
    "KMeansQuantizer",
    "OctaveGrid",
    "OutputUnits",
    "Quantizer",
    "RateGoal",
    "RateModel",
    "UniformGrid",
    "UniformQuantizer",
    "kmeans",
    "octaves",
    "quantizer_for",
    "uniform",
]

# Every file of this folder is imported, so that a new quantizer is registered.
registry.discover(__name__, __path__, "quantizer")
