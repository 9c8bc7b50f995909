"""Optimal Brain Compression: weights are removed one by one, and the remaining ones re-solved exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from karikomi.prune.pattern import NofM
from karikomi.reconstruction.least_squares import Damped, LeastSquares, Reconstructed, damped

MEMORY = 1 << 25
"""Float64 entries of the row traces in memory at a time, or those of one row if more."""

STEPS = 16
"""Removals between two checks for finished rows."""

Progress = Callable[[float], None]


def obc(
    weights: np.ndarray,
    problem: LeastSquares,
    remove: int | NofM,
    *,
    damping: float = 0.01,
    gone: np.ndarray | None = None,
    where: str = "reconstruction",
    progress: Progress | None = None,
) -> Reconstructed:
    """Remove weights one by one, each the cheapest, and re-solve for the remaining ones.

    For each row ``argmin w_i^2 / [H^-1]_ii``, then ``w -= w_i / [H^-1]_ii H^-1[:, i]`` and ``H^-1`` without
    row and column i; of all rows' traces the `remove` cheapest removals are taken. The final weights are
    the least squares for the mask, ``min ||Y - W X||^2 + damping mean(diag(X X^T)) ||W - weights||^2``.

    `weights`: (rows, inputs). `remove`: how many in all, or of each `of` consecutive inputs all but
    `keep`. `gone`: boolean, weights removed before: they are removed first, and count. `where`: for errors. `progress`:
    called now and then with the share of the work that is done.
    Raises `InvalidArgument` for shapes and amounts, `NonFinite` for non-finite numbers and if no damping
    gives a Cholesky factor.

    >>> weights = np.array([[3.0, 1.0]])
    >>> result = obc(weights, LeastSquares.of(weights, np.array([[1.0, 0.5], [0.5, 1.0]])), 1, damping=1e-9)
    >>> result.weights.round(6).tolist(), result.kept.tolist()
    ([[3.5, 0.0]], [[True, False]])

    Source: Frantar and Alistarh 2022, "Optimal Brain Compression", algorithms 1 and 2. Deviation: all rows
    share one inverse, and each extends a pivoted Cholesky factor of it, instead of downdating a copy.
    """
    system = damped(weights, problem, remove, damping=damping, gone=gone, where=where)
    gone = system.gone.reshape(weights.shape)
    if isinstance(remove, NofM):
        kept = _kept_of_groups(system, remove, progress) & ~gone
    else:
        kept = _kept_of_all(system, remove, progress)
    return Reconstructed(system.solution(kept), kept, system.damping)


def operations(shape: tuple[int, int], remove: int) -> float:
    """Return about how many operations `obc` needs to remove so many weights of a matrix (rows, inputs).

    >>> operations((16, 8192), 16 * 4096)
    2199023255552.0
    """
    rows, size = shape
    return float(remove) ** 2 / rows * size if rows else 0.0


def _kept_of_groups(system: Damped, pattern: NofM, progress: Progress | None) -> np.ndarray:
    most = system.start.shape[2] // pattern.of * (pattern.of - pattern.keep)
    kept = np.ones((system.start.shape[0] * system.start.shape[1], system.start.shape[2]), bool)
    parts = _parts(system, most)
    for number, part in enumerate(parts):
        trace = _Trace(system, part, most, pattern)
        for _ in range(most):
            trace.step()
            if progress is not None and trace.done % STEPS == 0:
                progress((number + (trace.done / most) ** 2) / len(parts))
        np.put_along_axis(kept[part], trace.order, False, axis=1)
    return kept


def _kept_of_all(system: Damped, remove: int, progress: Progress | None) -> np.ndarray:
    rows, size = system.start.shape[0] * system.start.shape[1], system.start.shape[2]
    losses, order = np.full((rows, size), np.inf), np.zeros((rows, size), np.int64)
    parts = _parts(system, size)
    for number, part in enumerate(parts):
        trace = _Trace(system, part, size)
        while len(trace.rows) and trace.done < size:
            trace.step()
            if trace.done % STEPS == 0:
                losses[part] = trace.losses
                trace.leave(losses, remove)
                if progress is not None:
                    # A step costs as much as there were before it; most rows leave before the end.
                    progress((number + (trace.done / size) ** 2) / len(parts))
        losses[part], order[part] = trace.losses, trace.order
    kept = np.ones((rows, size), bool)
    chosen = np.argsort(losses, axis=None, kind="stable")[:remove]
    row, step = np.unravel_index(chosen, losses.shape)
    kept[row, order[row, step]] = False
    return kept


def _parts(system: Damped, most: int) -> list[slice]:
    groups, rows, size = system.start.shape
    together = max(MEMORY // max(size * most, 1), 1)
    return [slice(first, first + together) for first in range(0, groups * rows, together)]


class _Trace:
    """The removals of some rows, step by step: `order[row, step]` is removed at the loss `losses[row, step]`.

    Losses are running maxima: a cheap removal after an expensive one is not available before it.
    """

    def __init__(self, system: Damped, part: slice, most: int, pattern: NofM | None = None) -> None:
        groups, rows, size = system.start.shape
        self._inverse = system.inverse
        self._group = np.repeat(np.arange(groups), rows)[part]
        self._work = system.start.reshape(-1, size)[part].copy()
        self._gone = system.gone.reshape(-1, size)[part]
        self._diagonal = np.diagonal(system.inverse, axis1=1, axis2=2)[self._group].copy()
        self._factor = np.empty((len(self._work), most, size))
        self._open = np.ones(self._work.shape, bool)
        self._pattern = pattern
        self.rows = np.arange(len(self._work))
        self.done = 0
        self.losses = np.full((len(self._work), most if pattern else size), np.inf)
        self.order = np.zeros(self.losses.shape, np.int64)

    def step(self) -> None:
        """Remove the cheapest open weight of each row, and update the others."""
        at, now = np.arange(len(self.rows)), self.done
        losses = np.where(self._gone, -1.0, self._work**2 / self._diagonal)
        place = np.where(self._open, losses, np.inf).argmin(1)
        earlier = self.losses[self.rows, now - 1] if now else -1.0
        self.losses[self.rows, now] = np.maximum(losses[at, place], earlier)
        self.order[self.rows, now] = place
        before = self._factor[: len(at), :now]
        column = self._inverse[self._group, place]
        # einsum instead of matmul: for products this small, the threads of BLAS cost more than they gain.
        column -= np.einsum("rk,rkd->rd", before[at, :, place], before)
        column /= np.sqrt(column[at, place])[:, None]
        self._factor[: len(at), now] = column
        self._work -= column * (self._work[at, place] / column[at, place])[:, None]
        self._diagonal -= column**2
        self._close(at, place)
        self.done += 1

    def leave(self, losses: np.ndarray, remove: int) -> None:
        """Drop the rows without further removals among the `remove` cheapest of `losses`."""
        if remove < 1 or np.isfinite(losses).sum() < remove:
            return
        bound = np.partition(losses, remove - 1, axis=None)[remove - 1]
        stay = self.losses[self.rows, self.done - 1] <= bound
        if 8 * stay.sum() > 7 * len(stay):
            return
        # In place and from the front, to avoid a second copy of the factors.
        for to, origin in enumerate(np.flatnonzero(stay)):
            self._factor[to, : self.done] = self._factor[origin, : self.done]
        for name in ("rows", "_group", "_work", "_gone", "_diagonal", "_open"):
            setattr(self, name, getattr(self, name)[stay])

    def _close(self, at: np.ndarray, place: np.ndarray) -> None:
        self._open[at, place] = False
        self._diagonal[at, place] = 1.0
        self._work[at, place] = 0.0
        if self._pattern:
            keep, of = self._pattern.keep, self._pattern.of
            spent = self._open.reshape(len(at), -1, of).sum(2) <= keep
            self._open &= ~np.repeat(spent, of, axis=1)
