"""CERWU: second-order rounding that weighs each error against the bits of the code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from karikomi.errors import check
from karikomi.quantize.code_lengths import CodeLengths
from karikomi.quantize.error_feedback import (
    Floats,
    Lattice,
    Price,
    RoundingProblem,
    cheapest,
    fed_back,
)
from karikomi.quantize.second_order import GPTQ
from karikomi.registry import register

LONGEST = 2**11
"""The largest code whose bits are measured; larger ones take as many."""
ROWS = 2**12
"""Rows of weights in memory at a time where nothing is compensated."""


@register(
    "quantizer",
    name="cerwu",
    formula="q = argmin (w - v(q))^2 / [H^-1]_jj + lambda bits(q), then the error feedback of gptq",
    source="Conzel and Bamler 2025, CERWU (arXiv 2505.18758)",
)
@dataclass(frozen=True, slots=True, kw_only=True)
class CERWU(GPTQ):
    """GPTQ with a price on the bits of an entropy coder, for grids that are set by `rate`.

    `exchange`: lambda in units of the squared step, weighted by the importance of the row: 0 is GPTQ, and 0.12 the
    slope of the rate of a fine grid. `sweeps`: how often bits are measured, and all is rounded again. `damping`,
    `block` and `by_energy` as in `GPTQ`. Raises `InvalidArgument`.

    Source: as registered. Deviations: bits are those of a static table of the whole tensor, measured on the codes
    of the sweep before, instead of an adaptive coder's; steps and lambda of all tensors follow from their
    sensitivities.
    """

    exchange: float = 0.1
    sweeps: int = 2

    def __post_init__(self) -> None:
        GPTQ.__post_init__(self)
        good, many = 0.0 <= self.exchange < float("inf"), self.sweeps >= 1
        check(
            "CERWU",
            (good, "exchange out of range", self.exchange, ">= 0"),
            (many, "sweeps out of range", self.sweeps, ">= 1"),
        )

    def rounded(self, problem: RoundingProblem) -> Floats:
        """Return the codes of a layer; a bit is worth `exchange` times the energy of a squared step."""
        codes, lattice = fed_back(problem, block=self.block), problem.lattice
        left = 1.0 / np.diagonal(problem.upper, axis1=1, axis2=2)[:, None] ** 2
        step = float(np.mean(np.broadcast_to(lattice.scale**2 * left, codes.shape)))
        for _ in range(self.sweeps if self.exchange > 0.0 else 0):
            lengths = self._lengths(codes, lattice)
            price = Price(lengths, self.exchange * step / problem.importance)
            codes = fed_back(problem, block=self.block, price=price)
        return codes

    def alone(self, weights: Floats, lattice: Lattice, importance: Floats) -> Floats:
        """Return the codes of rows of weights without the inputs: errors against bits, nothing compensated.

        `weights`: (rows, inputs). `importance`: (rows,), the loss per squared error of each row, of mean about 1.
        """
        nearest = lattice.nearest(weights)
        codes = nearest.copy()
        square = float(np.mean(lattice.scale**2))
        scale = np.broadcast_to(lattice.scale, weights.shape)
        zero = np.broadcast_to(lattice.zero, weights.shape)
        for _ in range(self.sweeps if self.exchange > 0.0 else 0):
            lengths = self._lengths(codes, lattice)
            for part in np.array_split(np.arange(len(weights)), max(len(weights) // ROWS, 1)):
                price = Price(lengths, (self.exchange * square / importance[part])[:, None])
                given = weights[part], nearest[part] - zero[part], scale[part]
                codes[part] = zero[part] + cheapest(*given, np.ones(1), price)
        return codes

    def _lengths(self, codes: Floats, lattice: Lattice) -> CodeLengths:
        limit = min(max(lattice.high - lattice.low, 1), LONGEST)
        around = np.rint(codes - lattice.zero).astype(np.int64)
        return CodeLengths.measured(around, limit)
