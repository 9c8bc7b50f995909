"""The rounding of a layer's weights with its inputs known: the regression, put in order for a quantizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from karikomi.errors import check
from karikomi.quantize.error_feedback import Floats, Lattice, RoundingProblem
from karikomi.reconstruction.least_squares import LeastSquares, damped


class Rounder(Protocol):
    """What `karikomi.quantize.GPTQ`, `CERWU` and `AdaRound` have in common."""

    @property
    def damping(self) -> float:
        """The share of the mean diagonal that is added to the Gram matrix."""
        ...

    @property
    def by_energy(self) -> bool:
        """Whether the inputs of most energy come first."""
        ...

    def rounded(self, problem: RoundingProblem) -> Floats:
        """Return codes for the weights of the problem."""
        ...


@dataclass(frozen=True, slots=True)
class Rounded:
    """`codes`: int64 of shape (rows, inputs). `damping`: as used, more than requested without a Cholesky factor."""

    codes: np.ndarray
    damping: float


def rounded(
    method: Rounder,
    weights: np.ndarray,
    problem: LeastSquares,
    lattice: Lattice,
    *,
    gone: np.ndarray | None = None,
    importance: np.ndarray | None = None,
    where: str = "reconstruction",
) -> Rounded:
    """Round a layer's weights to a lattice such that its outputs change least.

    ``min ||Y - W X||^2 + damping mean(diag(X X^T)) ||W - weights||^2``, with Y the outputs of the dense network and X
    the inputs in the present one, whose earlier layers are rounded already.

    `weights`: (rows, inputs), of the dense layer. `gone`: boolean, weights that stay exactly zero, as pruned ones.
    `importance`: (rows,), the loss per output energy of each row, where a method weighs errors against bits.
    Raises `InvalidArgument` for shapes, `NonFinite` for non-finite numbers and if no damping gives a Cholesky factor.

    >>> from karikomi.quantize import GPTQ
    >>> weights, gram = np.array([[0.6, 0.6]]), np.array([[2.0, 1.9], [1.9, 2.0]])
    >>> lattice, problem = Lattice(np.ones((1, 1)), -7, 7), LeastSquares.of(weights, gram)
    >>> found = rounded(GPTQ(damping=1e-6), weights, problem, lattice)
    >>> lattice.nearest(weights).tolist(), found.codes.tolist()
    ([[1.0, 1.0]], [[1, 0]])

    Source: Frantar et al. 2023, "GPTQ"; the regression of dense outputs on present inputs as in He, Zhang and
    Sun 2017, "Channel Pruning for Accelerating Very Deep Neural Networks".
    """
    before = np.zeros(weights.shape, bool) if gone is None else gone
    fits = before.shape == weights.shape
    check(where, (fits, "the mask does not fit the weights", before.shape, weights.shape))
    share = method.damping
    system = damped(weights, problem, int(before.sum()), damping=share, gone=before, where=where)
    start = np.where(system.dead, system.weights, system.start)
    shape = start.shape
    energy = np.diagonal(system.gram, axis1=1, axis2=2)
    order = np.argsort(-energy, axis=1, kind="stable") if method.by_energy else None
    inverse = _reordered(system.inverse, order)
    ready = RoundingProblem(
        weights=_along(start, order),
        gram=_reordered(system.gram, order),
        upper=np.linalg.cholesky(inverse).swapaxes(1, 2),
        gone=_along(system.gone, order),
        lattice=_lattice(lattice, shape, order),
        importance=np.ones(shape[:2]) if importance is None else importance.reshape(shape[:2]),
    )
    codes = method.rounded(ready)
    back = None if order is None else np.argsort(order, axis=1, kind="stable")
    whole = np.rint(_along(codes, back)).astype(np.int64)
    return Rounded(whole.reshape(weights.shape), system.damping)


def spread_of(gram: np.ndarray, damping: float, *, where: str = "reconstruction") -> float:
    """Return how much of the energy of rounding errors is left when later inputs compensate: in (0, 1].

    ``mean(1 / U_jj^2) / mean(H_jj)`` with ``U^T U = H^-1``, H the damped Gram matrix (groups, inputs, inputs), inputs
    of most energy first; 1 for inputs that are not correlated.

    >>> [round(spread_of(gram[None], 0.01), 2) for gram in (np.eye(2), np.ones((2, 2)))]
    [1.0, 0.51]
    """
    zeros = np.zeros((gram.shape[0], gram.shape[2]))
    problem = LeastSquares.of(zeros, gram)
    system = damped(zeros, problem, 0, damping=damping, where=where)
    energy = np.diagonal(system.gram, axis1=1, axis2=2)
    inverse = _reordered(system.inverse, np.argsort(-energy, axis=1, kind="stable"))
    upper = np.linalg.cholesky(inverse).swapaxes(1, 2)
    left = 1.0 / np.diagonal(upper, axis1=1, axis2=2) ** 2
    return float(left.mean() / energy.mean())


def _lattice(lattice: Lattice, shape: tuple[int, ...], order: np.ndarray | None) -> Lattice:
    rows, inputs = shape[0] * shape[1], shape[2]

    def spread(numbers: np.ndarray | float) -> np.ndarray:
        flat = np.broadcast_to(np.asarray(numbers, np.float64), (rows, inputs))
        return _along(flat.reshape(shape), order)

    return Lattice(spread(lattice.scale), lattice.low, lattice.high, spread(lattice.zero))


def _along(array: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Return an array (groups, rows, inputs) with its inputs in another order."""
    return array if order is None else np.take_along_axis(array, order[:, None], 2)


def _reordered(square: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    if order is None:
        return square
    return np.take_along_axis(np.take_along_axis(square, order[:, :, None], 1), order[:, None], 2)
