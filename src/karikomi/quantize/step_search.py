"""The grids of a rate for host arrays: one step per tensor up to a factor, and the factor where codes have the rate."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from karikomi.quantize.code_lengths import coded_bits
from karikomi.quantize.grids import MOST_BITS, SMALLEST_SCALE, Coded, UniformGrid
from karikomi.quantize.steps import UNSEEN, factor_at, relative_steps, row_factors

SAMPLE = 1 << 16
"""Weights of a tensor that are drawn for the search of a rate."""
OCTAVE, LEAST_SLOPE = 0.25, 0.25

Floats = NDArray[np.float64]


class StepSearch:
    """What the search of a rate knows of the weights.

    `dense`: names and weights, read once and not kept. `curvature`: name -> mean squared gradients, of the weight's
    shape, where they are known. `spreads`: name -> the part of errors that compensation leaves. `by_rows`: weights
    whose rows have steps of their own, as those of embeddings. `fixed`: bits of what else is coded; `numbers`: how
    many there are in all.

    >>> weights = {"w": np.random.default_rng(0).normal(size=(100, 100))}
    >>> search = StepSearch(weights.items(), {}, fixed=0.0, numbers=10_000)
    >>> factor = search.factor_at(3.0, where="")
    >>> round(search.rate_of({n: nearest(weights[n], g) for n, g in search.grids(factor).items()}), 2)
    3.0
    """

    def __init__(
        self,
        dense: Iterable[tuple[str, NDArray]],
        curvature: Mapping[str, NDArray],
        spreads: Mapping[str, float] | None = None,
        by_rows: Collection[str] = (),
        *,
        fixed: float,
        numbers: int,
        seed: int = 0,
    ) -> None:
        self._fixed, self._numbers = fixed, numbers
        self._sizes: dict[str, int] = {}
        self._peaks: dict[str, Floats] = {}
        self._rows: dict[str, Floats] = {}
        self._drawn: dict[str, Floats] = {}
        means, deviations = {}, {}
        random = np.random.default_rng(seed)
        for name, weight in dense:
            array = np.asarray(weight, np.float64)
            mean = self._mean(name, curvature.get(name), rows=name in by_rows)
            means[name] = mean * (spreads or {}).get(name, 1.0)
            parts = len(self._rows.get(name, [1]))
            self._peaks[name] = np.abs(array).reshape(parts, -1).max(axis=1, initial=0.0)
            self._sizes[name] = array.size
            if name in self._rows:
                array = array / self._rows[name].reshape(-1, *(1,) * (array.ndim - 1))
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
        return float(2.0 ** (excess / max(slope, LEAST_SLOPE)))

    def grids(self, factor: float) -> dict[str, UniformGrid]:
        """Return the grid of each weight."""
        return {
            name: _grid(self._peaks[name], step * factor, self._rows.get(name))
            for name, step in self._steps.items()
        }

    def rate_of(self, coded: Mapping[str, Coded]) -> float:
        """Return the bits per number when these are the codes of the weights."""
        return (
            self._fixed + sum(coded_bits(item.codes) for item in coded.values())
        ) / self._numbers

    def _mean(self, name: str, square: NDArray | None, *, rows: bool) -> float:
        """Return the mean curvature of a weight; set the steps of its rows, if these have their own."""
        if square is None or not rows:
            return 0.0 if square is None else float(square.mean(dtype=np.float64))
        means = square.reshape(len(square), -1).mean(1, dtype=np.float64)
        self._rows[name] = row_factors(means)
        return float(np.mean((means + UNSEEN * means.mean()) * self._rows[name] ** 2))

    def _rate_at(self, factor: float) -> float:
        total = self._fixed
        for name, drawn in self._drawn.items():
            steps = np.clip(drawn / (self._steps[name] * factor), -(2.0**40), 2.0**40)
            codes = np.rint(steps).astype(np.int64)
            total += coded_bits(codes) * self._sizes[name] / max(drawn.size, 1)
        return total / self._numbers


def nearest(array: NDArray, grid: UniformGrid) -> Coded:
    """Return the nearest codes of a grid.

    >>> nearest(np.array([0.9, -9.0]), UniformGrid(np.float32([0.5]), None, 3)).codes.tolist()
    [2, -3]
    """
    codes = np.rint(array / grid.scale_of(array.shape).astype(np.float64))
    return Coded(np.clip(codes, -grid.limit, grid.limit).astype(grid.code_dtype), grid)


def narrowed(coded: Coded) -> Coded:
    """Return codes of a uniform grid on one of no more bits than they need."""
    grid: Any = coded.grid
    most = int(np.abs(coded.codes.astype(np.int64)).max(initial=0))
    narrow = UniformGrid(grid.scale, grid.axis, max(most.bit_length() + 1, 2), grid.groups)
    return Coded(coded.codes.astype(narrow.code_dtype), narrow)


def _grid(peaks: Floats, step: float, rows: Floats | None) -> UniformGrid:
    """Return a grid that covers twice the range of weights with these peaks, as compensation may leave it.

    It has one step, or with `rows` one for each row, that many times as large.
    """
    steps = np.array([step]) if rows is None else step * rows
    most = float((peaks / steps).max(initial=0.0))
    bits = min(max(math.ceil(math.log2(2.0 * most + 2.0)) + 1, 2), MOST_BITS)
    # The finest step that a grid of 16 bits can have; it is far below what rates up to 16 ask for.
    least = peaks / (2 ** (MOST_BITS - 1) - 1) if bits == MOST_BITS else 0.0
    scale = np.maximum(np.maximum(steps, least), SMALLEST_SCALE).astype(np.float32)
    return UniformGrid(scale, None if rows is None else 0, bits)
