"""Round the kernels of layers one after the other, each with its inputs known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from karikomi.errors import Unsupported
from karikomi.keras.facts.layer_calls import steady
from karikomi.keras.layers import codes
from karikomi.keras.layers.unit_axes import Weight
from karikomi.keras.reconstruction.calibration import Regressions
from karikomi.keras.reconstruction.weight_reads import KernelMatrix
from karikomi.quantize import AffineGrid, Coded, Grid, UniformGrid
from karikomi.quantize.error_feedback import Lattice
from karikomi.quantize.units import from_rows
from karikomi.reconstruction.gptq import Rounder, rounded

ROW = 0.02


def round_(
    model: Any,
    weights: Mapping[str, Weight],
    nearest: Mapping[str, Coded],
    method: Rounder,
    data: Iterable[Any],
    *,
    curvature: Mapping[str, np.ndarray] | None = None,
    progress: bool,
    where: str,
) -> tuple[dict[str, Coded], dict[str, str]]:
    """Round variables to the grids of `nearest` in place, in the order of their layers.

    Returns ``(path -> codes, path -> why it has the nearest values, or more damping)``. Each layer sees what the layers
    before it put out now, and its outputs are to be those of the network that came. `curvature`: path -> the mean
    squared gradient of each weight, for a method that weighs errors against bits.
    """
    found, notes = dict(nearest), {}
    with steady(model):
        sums = Regressions(model, weights, data, where=f"{where}: data")
        for name, reason in sums.unread.items():
            notes[name] = f"nearest values: {reason}"
            codes.assign(weights[name].variable, nearest[name])
        for name in tqdm(sums.order, "round", leave=False, disable=None if progress else True):
            variable, grid, matrix = (
                weights[name].variable,
                nearest[name].grid,
                sums.sites[name].matrix,
            )
            dense = matrix.of(codes.floats_of(variable))
            shape, problem = tuple(map(int, variable.shape)), sums.problem(name)
            result = rounded(
                method,
                dense,
                problem,
                _lattice(grid, shape, matrix),
                gone=dense == 0.0,
                importance=_row_importance((curvature or {}).get(name), matrix),
                where=f"{where}: {name}",
            )
            whole = matrix.restored(result.codes, shape)
            other = Coded(whole.astype(grid.code_dtype), grid)
            errors = [problem.error(matrix.of(coded.decode())) for coded in (other, found[name])]
            if errors[0] < errors[1]:
                found[name] = other
                if result.damping > method.damping:
                    notes[name] = f"damping {result.damping:g} was needed"
            else:
                notes[name] = "nearest values: compensation was no better"
            codes.assign(variable, found[name])
    return found, notes


def _row_importance(square: np.ndarray | None, matrix: KernelMatrix) -> np.ndarray | None:
    """Return the mean curvature of each row, of mean 1; a part of the mean is added, as estimates may be near zero."""
    rows = None if square is None else matrix.of(square).mean(axis=1)
    mean = 0.0 if rows is None else float(rows.mean())
    return None if rows is None or not mean > 0.0 else (rows / mean + ROW) / (1.0 + ROW)


def _lattice(grid: Grid, shape: tuple[int, ...], matrix: KernelMatrix) -> Lattice:
    """Return a grid with scale and zero point for each entry of a kernel's matrix."""

    def spread(numbers: np.ndarray) -> np.ndarray:
        return matrix.of(np.broadcast_to(numbers, shape).astype(np.float64))

    if isinstance(grid, UniformGrid):
        return Lattice(spread(grid.scale_of(shape)), -grid.limit, grid.limit)
    if not isinstance(grid, AffineGrid):
        raise Unsupported("errors are compensated on uniform grids", got=type(grid).__name__)
    scale, zero = (from_rows(part, shape, grid.units) for part in grid.spread(shape))
    return Lattice(spread(scale), 0, 2**grid.bits - 1, spread(zero))
