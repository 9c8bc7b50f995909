"""One layer re-fitted: its dense outputs regressed on the inputs that are left and a constant, as sums over samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from karikomi.reconstruction.least_squares import LeastSquares, damped

DAMPING = 0.01
"""Of the mean diagonal of the Gram matrix."""


@dataclass(slots=True)
class AffineFit:
    """Sums over samples of the products of inputs, of which the last is the constant 1, and of targets with them.

    `gram`: (groups, inputs + 1, inputs + 1). `cross`: (groups, rows, inputs + 1). `energy`: of the targets.

    >>> x = np.array([[[0.0], [1.0], [2.0]]])
    >>> fit = AffineFit()
    >>> fit.add(x, 3.0 * x + 1.0)
    >>> weights, constants = fit.solved(np.array([[3.0]]), free=True)
    >>> weights.round(9).tolist(), constants.round(9).tolist(), round(fit.error(weights, constants), 9)
    ([[3.0]], [1.0], 0.0)
    """

    gram: np.ndarray = field(default_factory=lambda: np.zeros(0))
    cross: np.ndarray = field(default_factory=lambda: np.zeros(0))
    energy: float = 0.0

    def add(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Add samples: `inputs` of shape (groups, samples, inputs), `targets` (groups, samples, rows of a group)."""
        both = np.concatenate([inputs, np.ones((*inputs.shape[:2], 1), inputs.dtype)], axis=2)
        energy = float(np.square(targets, dtype=np.float64).sum())
        self.add_products(both.swapaxes(1, 2) @ both, targets.swapaxes(1, 2) @ both, energy)

    def add_products(self, gram: np.ndarray, cross: np.ndarray, energy: float) -> None:
        """Add products of samples, made elsewhere."""
        if not self.gram.size:
            self.gram, self.cross = np.zeros(gram.shape), np.zeros(cross.shape)
        self.gram += gram
        self.cross += cross
        self.energy += energy

    def solved(
        self, weights: np.ndarray, *, free: bool, damping: float = DAMPING, where: str = "refit"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the re-fitted weights (rows, inputs) and constants (rows): zeros unless these are `free`.

        ``min |Y - W X - c|^2 + damping mean(diag(X X^T)) |W - weights|^2``, with X centred where c is free.
        """
        gram, cross = self.gram[:, :-1, :-1], self.cross[:, :, :-1]
        count, means = self.gram[:, -1:, -1:], self.gram[:, :-1, -1:]
        if free:
            gram = gram - means @ means.mT / count
            cross = cross - self.cross[:, :, -1:] @ means.mT / count
        problem = LeastSquares(gram, cross, self.energy)
        found = damped(weights, problem, 0, damping=damping, where=where).start
        constants = (self.cross[:, :, -1:] - found @ means) / count
        return found.reshape(weights.shape), constants.reshape(-1) * free

    def error(self, weights: np.ndarray, constants: np.ndarray) -> float:
        """Return ``|Y - W X - c| / |Y|``."""
        both = np.concatenate([weights, constants[:, None]], axis=1)
        return LeastSquares(self.gram, self.cross, self.energy).error(both)
