"""The least-squares problem of reconstruction: a layer's outputs on its inputs, as sums over samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from karikomi.errors import InvalidArgument, NonFinite
from karikomi.prune.pattern import NofM

ATTEMPTS = 8
"""Attempts with tenfold damping each while the Gram matrix has no Cholesky factor."""


@dataclass(frozen=True, slots=True)
class LeastSquares:
    """``min ||Y - W X||^2`` over W, as float64 sums.

    `gram`: ``X X^T``, shape (groups, inputs, inputs). `cross`: ``Y X^T``, (groups, rows, inputs).
    `energy`: ``||Y||^2``. Groups are those of a grouped convolution, else one.

    >>> problem = LeastSquares.of(np.array([[3.0, 4.0]]), np.eye(2))
    >>> problem.error(np.array([[3.0, 0.0]]))
    0.8
    """

    gram: np.ndarray
    cross: np.ndarray
    energy: float

    @classmethod
    def of(cls, weights: np.ndarray, gram: np.ndarray) -> LeastSquares:
        """Return the problem with the solution `weights` (rows, inputs): ``Y = W X``."""
        wide, gram = grouped(weights, gram)
        cross = wide @ gram
        return cls(gram, cross, float((cross * wide).sum()))

    def error(self, weights: np.ndarray) -> float:
        """Return ``|Y - W X| / |Y|`` for weights of shape (rows, inputs); 0 if Y is zero."""
        wide = weights.reshape(self.cross.shape).astype(np.float64)
        lost = self.energy - 2.0 * (wide * self.cross).sum() + ((wide @ self.gram) * wide).sum()
        return math.sqrt(max(float(lost) / self.energy, 0.0)) if self.energy > 0.0 else 0.0


@dataclass(frozen=True, slots=True)
class Reconstructed:
    """`weights`: float64, zero where removed. `kept`: boolean. Both of shape (rows, inputs).

    `damping`: the share of the mean diagonal that was added to the Gram matrix, more than requested if
    there was no Cholesky factor.
    """

    weights: np.ndarray
    kept: np.ndarray
    damping: float


@dataclass(frozen=True, slots=True)
class Damped:
    """``min ||Y - W X||^2 + added ||W - weights||^2``, which has a unique solution, near the weights.

    `gram`, `cross`: damped; `inverse`: of `gram`. `start`: the solution with all weights, zero for
    inputs that are always zero, which `dead` marks. `gone`: weights that were removed before.
    All of shape (groups, ...). `damping`: the share of the mean diagonal that is `added`.
    """

    weights: np.ndarray
    gram: np.ndarray
    cross: np.ndarray
    inverse: np.ndarray
    start: np.ndarray
    dead: np.ndarray
    gone: np.ndarray
    damping: float

    def solution(self, kept: np.ndarray) -> np.ndarray:
        """Return the solution that is zero where `kept`, of shape (rows, inputs), is false."""
        solution = np.zeros(kept.shape)
        rows = self.cross.shape[1]
        for row, inside in enumerate(kept):
            if inside.any():
                gram = self.gram[row // rows][np.ix_(inside, inside)]
                cross = self.cross[row // rows, row % rows, inside]
                solution[row, inside] = np.linalg.solve(gram, cross)
        return solution


def damped(
    weights: np.ndarray,
    problem: LeastSquares,
    remove: int | NofM,
    *,
    damping: float,
    gone: np.ndarray | None = None,
    where: str = "reconstruction",
) -> Damped:
    """Return the damped problem, after checks.

    `weights`: (rows, inputs). `gone`: boolean, of the same shape. Raises `InvalidArgument` for shapes
    and amounts, `NonFinite` for non-finite numbers and if no damping gives a Cholesky factor.
    """
    wide, gram = grouped(weights, problem.gram)
    before = np.zeros(wide.shape, bool) if gone is None else gone.reshape(wide.shape)
    _check_amount(remove, wide, before, where)
    if not all(np.isfinite(array).all() for array in (wide, gram, problem.cross)):
        raise NonFinite("weights or inputs are NaN or infinite", where=where)
    mean = np.trace(gram, axis1=1, axis2=2) / gram.shape[-1]
    # A layer with zero inputs only is pruned by its weights alone.
    unit = np.where(mean > 0.0, mean, 1.0)[:, None, None]
    inverse, level = _inverse(gram, unit, damping, where)
    cross = problem.cross + level * unit * wide
    dead = np.broadcast_to(np.diagonal(gram, axis1=1, axis2=2)[:, None] == 0.0, wide.shape)
    start = np.where(dead, 0.0, cross @ inverse)
    full = gram + level * unit * np.eye(gram.shape[-1])
    return Damped(wide, full, cross, inverse, start, dead, before, level)


def grouped(weights: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (groups, rows, inputs) and gram (groups, inputs, inputs) in float64."""
    gram = np.asarray(gram, np.float64)
    gram = gram[None] if gram.ndim == 2 else gram
    groups, size = gram.shape[0], gram.shape[-1]
    fits = weights.ndim == 2 and weights.shape[1] == size and len(weights) % groups == 0
    if not fits or gram.shape[1:] != (size, size):
        raise InvalidArgument(
            "the gram does not fit the weights",
            where="reconstruction",
            got=f"{gram.shape} and {weights.shape}",
            allowed="(inputs, inputs) or (groups, inputs, inputs), and (rows, inputs)",
        )
    return weights.reshape(groups, -1, size).astype(np.float64), gram


def _inverse(
    gram: np.ndarray, unit: np.ndarray, damping: float, where: str
) -> tuple[np.ndarray, float]:
    level = damping
    for _ in range(ATTEMPTS):
        try:
            factor = np.linalg.cholesky(gram + level * unit * np.eye(gram.shape[-1]))
            half = np.linalg.inv(factor)
            inverse = half.swapaxes(1, 2) @ half
            np.linalg.cholesky(inverse)
        except np.linalg.LinAlgError:
            level *= 10.0
        else:
            return inverse, level
    raise NonFinite(
        "the gram of the inputs has no Cholesky factor",
        where=where,
        got=f"damping {damping:g} to {level / 10.0:g}",
    )


def _check_amount(remove: int | NofM, weights: np.ndarray, gone: np.ndarray, where: str) -> None:
    if isinstance(remove, NofM):
        if weights.shape[2] % remove.of:
            raise InvalidArgument(
                "the inputs are not a multiple of the group",
                where=where,
                got=weights.shape[2],
                allowed=f"a multiple of {remove.of}",
            )
    elif not int(gone.sum()) <= remove <= weights.size:
        raise InvalidArgument(
            "cannot remove that many",
            where=where,
            got=remove,
            allowed=f"{int(gone.sum())} (removed before) to {weights.size}",
        )
