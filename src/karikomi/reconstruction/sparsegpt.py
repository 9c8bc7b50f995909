"""SparseGPT: one sweep over a layer's inputs, with each column's loss compensated by those to its right."""

from __future__ import annotations

import numpy as np

from karikomi.prune.pattern import NofM
from karikomi.reconstruction.least_squares import LeastSquares, Reconstructed, damped


def sparsegpt(
    weights: np.ndarray,
    problem: LeastSquares,
    remove: int | NofM,
    *,
    block: int = 128,
    damping: float = 0.01,
    gone: np.ndarray | None = None,
    where: str = "reconstruction",
) -> Reconstructed:
    """Remove weights column by column; the columns to the right compensate the loss.

    With ``U^T U = H^-1``, ``U`` upper: in each block of columns the smallest ``w_j^2 / U_jj^2`` are removed,
    then from left to right ``w[j:] -= (w_j - q_j) / U_jj U[j, j:]``. Each block has its share of `remove`.

    `block`: columns that are masked together; for n:m each group is masked when the sweep reaches
    it. Other arguments, result and errors as for `karikomi.reconstruction.obc.obc`.

    >>> weights = np.array([[1.0, 3.0]])
    >>> gram = np.array([[1.0, 0.5], [0.5, 1.0]])
    >>> result = sparsegpt(weights, LeastSquares.of(weights, gram), 1, damping=1e-9)
    >>> result.weights.round(6).tolist(), result.kept.tolist()
    ([[0.0, 3.5]], [[False, True]])

    Source: Frantar and Alistarh 2023, "SparseGPT", algorithm 1. Deviations: exactly `remove` weights are
    removed; weights of inputs that are always zero first, and no more of them than that.
    """
    system = damped(weights, problem, remove, damping=damping, gone=gone, where=where)
    upper = np.linalg.cholesky(system.inverse).swapaxes(1, 2)
    work, kept = system.start.copy(), ~system.gone
    size = work.shape[2]
    width = max(block // remove.of, 1) * remove.of if isinstance(remove, NofM) else block
    edges = [*range(0, size, width), size]
    quotas = [] if isinstance(remove, NofM) else _quotas(system.gone, edges, remove)
    for place, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
        part, stays = work[:, :, first:last], kept[:, :, first:last]
        factor = upper[:, first:last, first:last]
        if not isinstance(remove, NofM):
            stays[...] = _without_smallest(_losses(part, factor), stays, quotas[place])
        pattern = remove if isinstance(remove, NofM) else None
        errors = _swept(part, stays, factor, pattern)
        work[:, :, last:] -= errors @ upper[:, first:last, last:]
    # The kept weights of dead inputs were excluded from the sweep.
    work = np.where(kept, np.where(system.dead, system.weights, work), 0.0)
    return Reconstructed(work.reshape(weights.shape), kept.reshape(weights.shape), system.damping)


def _swept(
    part: np.ndarray, stays: np.ndarray, factor: np.ndarray, pattern: NofM | None
) -> np.ndarray:
    """Sweep a block of columns in place, with n:m masks; return the errors for the columns to its right."""
    errors = np.empty_like(part)
    for j in range(part.shape[2]):
        if pattern and j % pattern.of == 0:
            group = slice(j, j + pattern.of)
            losses = _losses(part[:, :, group], factor[:, group, group])
            stays[:, :, group] &= _largest(np.where(stays[:, :, group], losses, -1.0), pattern.keep)
        lost = np.where(stays[:, :, j], 0.0, part[:, :, j])
        errors[:, :, j] = lost / factor[:, None, j, j]
        part[:, :, j:] -= errors[:, :, j, None] * factor[:, None, j, j:]
    return errors


def _losses(part: np.ndarray, factor: np.ndarray) -> np.ndarray:
    # The diagonal of the factor is a square root, hence the square of the quotient.
    return (part / np.diagonal(factor, axis1=1, axis2=2)[:, None]) ** 2


def _quotas(gone: np.ndarray, edges: list[int], remove: int) -> list[int]:
    """Return the number removed per block: earlier ones and a share of the rest; `remove` in all."""
    before = np.add.reduceat(gone.sum((0, 1)), edges[:-1])
    free = np.diff(edges) * gone.shape[0] * gone.shape[1] - before
    shares = np.cumsum(free) * ((remove - before.sum()) / max(free.sum(), 1))
    return (before + np.diff(np.rint(shares).astype(np.int64), prepend=0)).tolist()


def _without_smallest(losses: np.ndarray, stays: np.ndarray, count: int) -> np.ndarray:
    """Return the mask without the `count` smallest losses, weights removed before first."""
    kept = np.ones(losses.size, bool)
    kept[np.argsort(np.where(stays, losses, -1.0), axis=None, kind="stable")[:count]] = False
    return kept.reshape(losses.shape)


def _largest(losses: np.ndarray, keep: int) -> np.ndarray:
    largest = np.zeros(losses.shape, bool)
    order = np.argsort(losses, axis=2, kind="stable")
    np.put_along_axis(largest, order[:, :, losses.shape[2] - keep :], True, axis=2)
    return largest
