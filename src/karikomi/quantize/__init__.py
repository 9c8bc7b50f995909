"""Decide the grid: from float weights to integer codes and the numbers they refer to."""

from __future__ import annotations

from karikomi.quantize.codebook import kmeans
from karikomi.quantize.grid import Codebook, Coded, Grid, UniformGrid
from karikomi.quantize.rounding import uniform

__all__ = ["Codebook", "Coded", "Grid", "UniformGrid", "kmeans", "uniform"]
