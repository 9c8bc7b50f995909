"""Round the weights of layers one after the other, each with its inputs known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from karikomi.errors import Unsupported
from karikomi.quantize import AffineGrid, Coded, Grid, UniformGrid
from karikomi.quantize.error_feedback import Lattice
from karikomi.quantize.units import from_rows
from karikomi.reconstruction.gptq import Rounder, rounded, spread_of
from karikomi.reconstruction.least_squares import LeastSquares
from karikomi.torch.modules import codes
from karikomi.torch.reconstruction.calibration import (
    Regressions,
    matrix_weight,
    weight_matrix,
)
from karikomi.torch.tracing.windows import Window

MOST_ENTRIES = 1 << 26
"""Entries of Gram matrices in memory at a time, or those of one layer if more."""

POSITIONS = 64
"""Of a convolution's outputs for an example, how many are summed: neighbours say the same."""
ROW = 0.02
"""The part of the mean importance that is added to each row: an estimate of few gradients may be near zero."""


class Compensation:
    """The layers of a module whose inputs are seen in the data, in the order of the forward pass.

    `weights`: present tensors; `dense`: tensors of the network before, these among them. `unread`: weight name -> why
    it is not compensated.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Mapping[str, torch.Tensor],
        dense: Mapping[str, torch.Tensor],
        data: Iterable[Any],
        *,
        progress: bool,
        where: str,
    ) -> None:
        self._sums = Regressions(
            module, weights, dense, data, where=where, everywhere=True, positions=POSITIONS
        )
        self._weights, self._dense, self._where = weights, dense, where
        self._hidden = None if progress else True
        tied = {n: r for n, r in self._sums.strays.items() if n not in self._sums.unread}
        self.unread = {
            **{n: f"read by {reader}" for n, reader in self._sums.unread.items()},
            **{n: f"read by {reader} too" for n, reader in tied.items()},
        }
        self.names = [name for name in self._sums.order if name not in tied]

    def spreads(self, damping: float) -> dict[str, float]:
        """Return weight name -> the part of the rounding errors' energy that compensation leaves, in (0, 1]."""
        found = {}
        for part in self._parts(self.names):
            for name, gram in self._sums.grams(part).items():
                found[name] = spread_of(gram, damping, where=f"{self._where}: {name}")
        return found

    def round_(
        self,
        method: Rounder,
        grids: Mapping[str, Grid],
        curvature: Mapping[str, torch.Tensor],
    ) -> tuple[dict[str, Coded], dict[str, str]]:
        """Round each weight to its grid in place; return the codes, and notes on layers that the data says little of.

        `curvature`: the mean squared gradient of each weight, for a method that weighs errors against bits.
        """
        found, notes = {}, {}
        for name, problem in self._problems():
            dense, window, grid = self._dense[name], self._sums.windows[name], grids[name]
            matrix = weight_matrix(dense.double(), window).cpu().numpy()
            gone, lattice = matrix == 0.0, _lattice(grid, dense, window)
            given = {"gone": gone, "where": f"{self._where}: {name}"}
            if name in curvature:
                given["importance"] = row_importance(curvature[name], window, least=ROW)
            result = rounded(method, matrix, problem, lattice, **given)
            chosen, nearest = result.codes, np.rint(lattice.nearest(matrix)).astype(np.int64)
            # What a mask removes late takes up errors of the weights before it, and loses them.
            errors = [problem.error(lattice.values(part)) for part in (chosen, nearest)]
            if gone.any() and errors[0] > errors[1]:
                chosen = nearest
                notes[name] = "nearest values: compensation was no better"
            whole = matrix_weight(torch.from_numpy(chosen), tuple(dense.shape), window)
            found[name] = Coded(whole.numpy().astype(grid.code_dtype), grid)
            self._weights[name].copy_(codes.decoded(found[name], dense.dtype))
            rows, inputs = self._sums.rows[name], matrix.shape[1]
            if result.damping > method.damping:
                notes[name] = f"damping {result.damping:g} was needed"
            elif rows < inputs:
                notes[name] = f"{rows} rows of {inputs} inputs were seen: give more data"
        return found, notes

    def _problems(self) -> Iterator[tuple[str, LeastSquares]]:
        """Yield weight name -> regression, those of the same inputs from one pass, in parts that fit in memory."""
        runs = [[name for name in run if name in self.names] for run in self._sums.together]
        bar = tqdm(total=len(self.names), desc="round", leave=False, disable=self._hidden)
        with bar:
            for run in runs:
                for part in self._parts(run):
                    if not self._sums.is_ahead(part[0]):
                        at = self.names.index(part[0])
                        self._sums.look_ahead(self.names[at:], MOST_ENTRIES)
                    problems = self._sums.problems(part)
                    for name in part:
                        yield name, problems.pop(name)
                        bar.update()

    def _parts(self, names: Iterable[str]) -> Iterator[list[str]]:
        part: list[str] = []
        entries = 0
        for name in names:
            size = self._sums.gram_entries(name)
            if part and entries + size > MOST_ENTRIES:
                yield part
                part, entries = [], 0
            part.append(name)
            entries += size
        if part:
            yield part


def row_importance(square: torch.Tensor, window: Window | None, *, least: float) -> np.ndarray:
    """Return the mean of an array of a weight's shape over each row of its matrix, of mean 1.

    `least`: the part of the mean that is added to each.
    """
    rows = weight_matrix(square.double(), window).mean(1).cpu().numpy()
    mean = float(rows.mean())
    return (rows / mean + least) / (1.0 + least) if mean > 0.0 else np.ones_like(rows)


def _lattice(grid: Grid, dense: torch.Tensor, window: Window | None) -> Lattice:
    """Return a grid with scale and zero point for each entry of the weight's matrix."""
    shape = tuple(dense.shape)
    if isinstance(grid, UniformGrid):
        scale, zero, low, high = grid.scale_of(shape), 0.0, -grid.limit, grid.limit
        return Lattice(_spread(scale, shape, window), low, high, zero)
    if not isinstance(grid, AffineGrid):
        raise Unsupported("errors are compensated on uniform grids", got=type(grid).__name__)
    scale, zero = (from_rows(part, shape, grid.units) for part in grid.spread(shape))
    return Lattice(_spread(scale, shape, window), 0, 2**grid.bits - 1, _spread(zero, shape, window))


def _spread(numbers: np.ndarray, shape: tuple[int, ...], window: Window | None) -> np.ndarray:
    whole = torch.from_numpy(np.broadcast_to(numbers, shape).astype(np.float64))
    return weight_matrix(whole, window).numpy()
