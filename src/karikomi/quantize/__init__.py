"""Decide the grid: from float weights to integer codes and the numbers they refer to."""

from __future__ import annotations

from karikomi.quantize.grids import Codebook, Coded, Grid, UniformGrid
from karikomi.quantize.kmeans_codebook import kmeans
from karikomi.quantize.nearest import uniform
from karikomi.quantize.quantizer import OutputUnits, Quantizer, quantizer_for

__all__ = [
    "Codebook",
    "Coded",
    "Grid",
    "OutputUnits",
    "Quantizer",
    "UniformGrid",
    "kmeans",
    "quantizer_for",
    "uniform",
]
