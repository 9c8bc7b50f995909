"""Decide the grid: from float weights to integer codes and the numbers they refer to."""

from __future__ import annotations

from niwaki.quantize.codebook import kmeans
from niwaki.quantize.grid import Codebook, Coded, Grid, UniformGrid
from niwaki.quantize.rounding import uniform

__all__ = ["Codebook", "Coded", "Grid", "UniformGrid", "kmeans", "uniform"]
