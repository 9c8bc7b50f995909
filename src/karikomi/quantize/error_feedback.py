"""Rounding one input of a layer after the other: the inputs that are still free compensate each error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from karikomi.quantize.code_lengths import CodeLengths

SHORTER = 1
"""How many codes nearer to zero than the nearest one are tried, and zero, where bits have a price."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Lattice:
    """Evenly spaced values ``scale * (code - zero)`` for codes in ``[low, high]``.

    `scale` and `zero` broadcast to (rows, inputs).
    """

    scale: Floats
    low: int
    high: int
    zero: Floats | float = 0.0

    def nearest(self, weights: Floats) -> Floats:
        """Return the codes of weights, as float64."""
        return np.clip(np.rint(weights / self.scale + self.zero), self.low, self.high)

    def values(self, codes: NDArray) -> Floats:
        """Return the values of codes."""
        return self.scale * (codes - self.zero)


@dataclass(frozen=True, slots=True)
class Price:
    """What the bits of a code cost, in units of the layer's output energy.

    `lengths`: bits by code. `per_bit`: of shape (groups, rows), the energy that a bit is worth in each row.
    """

    lengths: CodeLengths
    per_bit: Floats


@dataclass(frozen=True, slots=True)
class RoundingProblem:
    """``min ||Y - W X||^2`` over W on a lattice, for the rows of each group of a layer.

    `weights`: (groups, rows, inputs), the solution without a lattice. `gram`: ``X X^T``, damped, (groups, inputs,
    inputs); `upper`: its ``U`` with ``U^T U = H^-1``; both with the inputs in the order of the sweep, as all others.
    `gone`: weights that are zero. `lattice`: its arrays broadcast to `weights`. `importance`: (groups, rows), the loss
    per output energy, of mean about 1.
    """

    weights: Floats
    gram: Floats
    upper: Floats
    gone: NDArray[np.bool_]
    lattice: Lattice
    importance: Floats


def fed_back(problem: RoundingProblem, *, block: int, price: Price | None = None) -> Floats:
    """Return the codes of a sweep over the inputs, as float64 of the shape of the weights.

    For each input ``j`` the code of ``w_j``, and ``w_k -= (w_j - v) / U_jj U_jk`` for ``k > j``, with ``v`` the value
    of the code. Without a `price` that is the nearest code; with one it minimises ``(w_j - v)^2 / U_jj^2 + per_bit
    bits(code)`` over the nearest code, the next one towards zero, and zero. `block`: inputs between two
    updates of all to their right, which changes the time alone.
    """
    work, codes = problem.weights.copy(), np.empty(problem.weights.shape)
    size = work.shape[2]
    for first in range(0, size, block):
        last = min(first + block, size)
        part, factor = work[:, :, first:last], problem.upper[:, first:last, first:last]
        errors = np.empty_like(part)
        for j in range(last - first):
            unit = factor[:, None, j, j]
            codes[:, :, first + j], values = _rounded(
                problem, part[:, :, j], first + j, unit, price
            )
            errors[:, :, j] = (part[:, :, j] - values) / unit
            part[:, :, j:] -= errors[:, :, j, None] * factor[:, None, j, j:]
        work[:, :, last:] -= errors @ problem.upper[:, first:last, last:]
    return codes


def _rounded(
    problem: RoundingProblem, weights: Floats, at: int, unit: Floats, price: Price | None
) -> tuple[Floats, Floats]:
    """Return the codes of one input and their values."""
    lattice = problem.lattice
    scale = np.broadcast_to(lattice.scale, problem.weights.shape)[:, :, at]
    zero = np.broadcast_to(lattice.zero, problem.weights.shape)[:, :, at]
    codes = np.clip(np.rint(weights / scale + zero), lattice.low, lattice.high)
    if price is not None:
        codes = cheapest(weights, codes - zero, scale, unit, price) + zero
    codes = np.where(problem.gone[:, :, at], zero, codes)
    return codes, scale * (codes - zero)


def cheapest(weights: Floats, nearest: Floats, scale: Floats, unit: Floats, price: Price) -> Floats:
    """Return the codes between the nearest and zero that cost least, errors and bits together."""
    sign, size = np.sign(nearest), np.abs(nearest)
    tried = [nearest, np.zeros_like(nearest)]
    tried += [sign * np.maximum(size - k, 0) for k in range(1, SHORTER + 1)]
    codes = np.stack(tried)
    costs = ((weights - scale * codes) / unit) ** 2 + price.per_bit * price.lengths.of(codes)
    return np.take_along_axis(codes, costs.argmin(0)[None], 0)[0]
