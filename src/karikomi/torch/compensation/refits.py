"""One layer re-fitted: its dense outputs regressed on the inputs that are left, as sums over samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from karikomi.reconstruction.least_squares import LeastSquares, damped
from karikomi.torch.tracing.patches import patches
from karikomi.torch.tracing.weight_reads import Reading

DAMPING = 0.01
"""Of the mean diagonal of the Gram matrix."""


@dataclass(slots=True)
class Sums:
    """Sums over samples of the products of inputs, of which the last is the constant 1, and of targets with them.

    `gram`: (groups, inputs + 1, inputs + 1). `cross`: (groups, rows, inputs + 1). `energy`: of the targets.
    """

    gram: np.ndarray = field(default_factory=lambda: np.zeros(0))
    cross: np.ndarray = field(default_factory=lambda: np.zeros(0))
    energy: float = 0.0

    def add(self, reading: Reading, targets: torch.Tensor) -> None:
        """Add the inputs of one reading, and its targets in the layout of its outputs."""
        groups = reading.window.groups if reading.window else 1
        rows = _rows(reading, targets).unflatten(-1, (groups, -1)).movedim(1, 0)
        first = 0
        for block in patches(reading):
            own = rows[:, first : first + block.shape[1]].to(block.dtype)
            first += block.shape[1]
            inputs = torch.cat([block, block.new_ones((*block.shape[:2], 1))], dim=2)
            gram, cross = inputs.mT @ inputs, own.mT @ inputs
            if not self.gram.size:
                self.gram, self.cross = np.zeros(gram.shape), np.zeros(cross.shape)
            self.gram += gram.double().cpu().numpy()
            self.cross += cross.double().cpu().numpy()
            self.energy += float(own.double().square().sum())

    def solved(
        self, weights: np.ndarray, *, free: bool, damping: float = DAMPING, where: str = "refit"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the re-fitted weights (rows, inputs) and constants (rows): zeros unless these are `free`."""
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


def _rows(reading: Reading, targets: torch.Tensor) -> torch.Tensor:
    """Return targets as (samples, outputs), in the order of the samples of `patches`."""
    if reading.window is None:
        return targets.reshape(-1, targets.shape[-1])
    if targets.dim() == len(reading.window.kernel) + 1:
        targets = targets[None]
    return targets.movedim(1, -1).flatten(0, -2)
