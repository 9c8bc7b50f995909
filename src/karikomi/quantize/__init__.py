"""Decide the grid: from float weights to integer codes and the numbers they refer to."""

from __future__ import annotations

from karikomi.quantize.grids import Codebook, Coded, Grid, UniformGrid
from karikomi.quantize.kmeans_codebook import kmeans
from karikomi.quantize.nearest import uniform

__all__ = ["Codebook", "Coded", "Grid", "UniformGrid", "kmeans", "uniform"]
