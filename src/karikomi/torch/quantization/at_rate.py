"""The grids of a rate: one step per tensor up to a factor, and the factor at which all codes have the rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.quantize import Coded, UniformGrid
from karikomi.quantize.code_lengths import coded_bits
from karikomi.quantize.grids import SMALLEST_SCALE
from karikomi.quantize.steps import UNSEEN, factor_at, relative_steps, row_factors
from karikomi.torch.modules.prunable import EMBEDDINGS

SAMPLE = 1 << 16
"""Weights of a tensor that are drawn for the search of a rate."""
MOST_BITS = 16
OCTAVE = 0.25
LEAST_SLOPE = 0.25


class RateSearch:
    """What the search of a rate knows of the weights.

    `dense`: name -> weight. `curvature`: name -> mean squared gradients, of the weight's shape; none without data.
    `spreads`: name -> the part of errors that compensation leaves. `embeddings`: the weights whose rows have steps of
    their own. `fixed`: bits of what else is coded; `numbers`: how many numbers there are in all.
    """

    def __init__(
        self,
        dense: Mapping[str, torch.Tensor],
        curvature: Mapping[str, torch.Tensor],
        spreads: Mapping[str, float],
        embeddings: set[str],
        *,
        fixed: float,
        numbers: int,
        seed: int,
    ) -> None:
        self._dense, self._fixed, self._numbers = dense, fixed, numbers
        self._embeddings = embeddings
        self._rows: dict[str, np.ndarray] = {}
        means, deviations, self._drawn = {}, {}, {}
        random = np.random.default_rng(seed)
        for name, weight in dense.items():
            array = weight.detach().double().cpu().numpy()
            means[name] = self._curvature(name, curvature.get(name)) * spreads.get(name, 1.0)
            if name in self._rows:
                array = array / self._rows[name][:, None]
            deviations[name] = float(np.sqrt(np.mean(array**2)))
            flat = array.reshape(-1)
            self._drawn[name] = flat if flat.size <= SAMPLE else random.choice(flat, SAMPLE)
        self._steps = relative_steps(means, deviations)

    def factor_at(self, rate: float, *, where: str) -> float:
        """Return the factor at which the nearest codes have a rate."""
        return factor_at(rate, self._rate_at, where=where)

    def correction(self, factor: float, excess: float) -> float:
        """Return by what to multiply a factor whose codes have so many bits too many."""
        slope = (self._rate_at(factor) - self._rate_at(factor * 2.0**OCTAVE)) / OCTAVE
        return 2.0 ** (excess / max(slope, LEAST_SLOPE))

    def grids(self, factor: float) -> dict[str, UniformGrid]:
        """Return the grid of each weight."""
        return {
            name: _grid(self._dense[name], step * factor, self._rows.get(name))
            for name, step in self._steps.items()
        }

    def rate_of(self, coded: Mapping[str, Coded]) -> float:
        """Return the bits per number when these are the codes of the weights."""
        return (
            self._fixed + sum(coded_bits(item.codes) for item in coded.values())
        ) / self._numbers

    def _curvature(self, name: str, square: torch.Tensor | None) -> float:
        """Return the mean curvature of a weight; set the steps of its rows if it is an embedding."""
        if square is None:
            return 0.0
        if name not in self._embeddings:
            return float(square.double().mean())
        rows = square.double().reshape(len(square), -1).mean(1).cpu().numpy()
        self._rows[name] = row_factors(rows)
        return float(np.mean((rows + UNSEEN * rows.mean()) * self._rows[name] ** 2))

    def _rate_at(self, factor: float) -> float:
        total = self._fixed
        for name, drawn in self._drawn.items():
            steps = np.clip(drawn / (self._steps[name] * factor), -(2.0**40), 2.0**40)
            codes = np.rint(steps).astype(np.int64)
            total += coded_bits(codes) * self._dense[name].numel() / max(drawn.size, 1)
        return total / self._numbers


def embeddings(module: nn.Module) -> set[str]:
    """Return the names of the weights of embeddings that no layer of another kind shares.

    >>> sorted(embeddings(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))))
    ['0.weight']
    """
    owners: dict[int, list[nn.Module]] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(layer)
    return {
        name
        for name, parameter in module.named_parameters()
        if all(isinstance(layer, EMBEDDINGS) for layer in owners[id(parameter)])
    }


def narrowed(coded: Coded) -> Coded:
    """Return codes on a uniform grid of no more bits than they need."""
    grid: Any = coded.grid
    most = int(np.abs(coded.codes.astype(np.int64)).max(initial=0))
    narrow = UniformGrid(grid.scale, grid.axis, max(most.bit_length() + 1, 2), grid.groups)
    return Coded(coded.codes.astype(narrow.code_dtype), narrow)


def _grid(dense: torch.Tensor, step: float, rows: np.ndarray | None) -> UniformGrid:
    """Return a grid that covers twice the range of the weights, as compensation may leave it.

    It has one step, or with `rows` one for each row, that many times as large.
    """
    steps = np.array([step]) if rows is None else step * rows
    size = dense.detach().double().abs().reshape(len(steps), -1)
    peaks = size.max(1).values.cpu().numpy() if size.numel() else np.zeros(len(steps))
    most = float((peaks / steps).max(initial=0.0))
    bits = min(max(int(np.ceil(np.log2(2.0 * most + 2.0))) + 1, 2), MOST_BITS)
    # The finest step that a grid of 16 bits can have; it is far below what rates up to 16 ask for.
    least = peaks / (2 ** (MOST_BITS - 1) - 1) if bits == MOST_BITS else 0.0
    scale = np.maximum(np.maximum(steps, least), SMALLEST_SCALE).astype(np.float32)
    return UniformGrid(scale, None if rows is None else 0, bits)
