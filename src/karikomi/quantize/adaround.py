"""AdaRound: for each weight the value below or above, chosen for the outputs of the layer by a relaxed search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from karikomi.errors import check
from karikomi.quantize.error_feedback import Floats, RoundingProblem
from karikomi.quantize.grids import Coded
from karikomi.quantize.nearest import UniformQuantizer
from karikomi.quantize.units import OutputUnits
from karikomi.registry import register

LOW, HIGH = -0.1, 1.1
"""Between which the sigmoid is stretched before it is clipped to [0, 1]."""
FIRST, LAST = 20.0, 2.0
"""The exponent of the penalty on values that are not rounded yet, at its start and its end."""
WITHOUT = 0.2
"""The share of the steps without the penalty."""
MOMENTA = 0.9, 0.999


@register(
    "quantizer",
    name="adaround",
    formula="min ||Y - s (floor(W/s) + h(V)) X||^2 + lambda sum(1 - |2 h(V) - 1|^beta), h = clip(1.2 sigmoid - 0.1)",
    source="Nagel, Amjad, van Baalen, Louizos and Blankevoort 2020, AdaRound",
)
@dataclass(frozen=True, slots=True, kw_only=True)
class AdaRound:
    """Each weight goes to the value below or above it; which, is learned by Adam on the layer's squared error.

    `steps`: of Adam, at the rate `learning_rate`. `penalty`: lambda, in units of the layer's mean squared
    step. `damping`: the share of the mean diagonal added to the Gram matrix. Raises `InvalidArgument`.

    Source: as registered. Deviations: the error is that of all calibration data, by their Gram matrix, in each step.
    """

    steps: int = 500
    learning_rate: float = 0.02
    penalty: float = 1.0
    damping: float = 0.01
    grid: UniformQuantizer = UniformQuantizer()

    argument = "bits"
    needs = frozenset({"regression"})
    by_energy = False

    def __post_init__(self) -> None:
        check(
            "AdaRound",
            (self.steps >= 1, "steps out of range", self.steps, ">= 1"),
            (self.learning_rate > 0.0, "learning_rate out of range", self.learning_rate, "> 0"),
            (self.penalty >= 0.0, "penalty out of range", self.penalty, ">= 0"),
            (self.damping > 0.0, "damping out of range", self.damping, "> 0"),
        )

    def quantize(
        self, weights: NDArray, size: int, *, units: OutputUnits, name: str = "weights"
    ) -> Coded:
        """Return the nearest codes of the grid: what remains where no inputs were seen."""
        return self.grid.quantize(weights, size, units=units, name=name)

    def rounded(self, problem: RoundingProblem) -> Floats:
        """Return the codes of a layer."""
        lattice = problem.lattice
        scale = np.broadcast_to(lattice.scale, problem.weights.shape)
        zero = np.broadcast_to(lattice.zero, problem.weights.shape)
        exact = problem.weights / scale + zero
        below = np.clip(np.floor(exact), lattice.low, lattice.high - 1)
        share = np.clip(exact - below, 0.01, 0.99)
        # The stretched sigmoid starts at the weights as they are.
        hidden = -np.log((HIGH - LOW) / (share - LOW) - 1.0)
        energy = np.diagonal(problem.gram, axis1=1, axis2=2)[:, None]
        unit = max(float(np.mean(scale**2 * energy)), 1e-300)
        self._learn_(hidden, problem, below - zero, scale, unit)
        up = (hidden >= 0.0) & ~problem.gone
        codes = below + up
        return np.where(problem.gone, zero, codes)

    def _learn_(
        self, hidden: Floats, problem: RoundingProblem, below: Floats, scale: Floats, unit: float
    ) -> None:
        first, second = np.zeros_like(hidden), np.zeros_like(hidden)
        for step in range(1, self.steps + 1):
            sigmoid = 1.0 / (1.0 + np.exp(-hidden))
            stretched = (HIGH - LOW) * sigmoid + LOW
            share = np.clip(stretched, 0.0, 1.0)
            values = np.where(problem.gone, 0.0, scale * (below + share))
            slope = 2.0 * ((values - problem.weights) @ problem.gram) * scale / unit
            slope += self.penalty * _penalty_slope(share, step / self.steps)
            inside = (stretched > 0.0) & (stretched < 1.0)
            slope *= inside * (HIGH - LOW) * sigmoid * (1.0 - sigmoid)
            first += (1.0 - MOMENTA[0]) * (slope - first)
            second += (1.0 - MOMENTA[1]) * (slope**2 - second)
            mean, square = first / (1.0 - MOMENTA[0] ** step), second / (1.0 - MOMENTA[1] ** step)
            hidden -= self.learning_rate * mean / (np.sqrt(square) + 1e-8)


def _penalty_slope(share: Floats, done: float) -> Floats:
    """Return the slope of ``1 - |2 h - 1|^beta``, with beta annealed; 0 in the first part of the steps."""
    if done < WITHOUT:
        return np.zeros_like(share)
    passed = (done - WITHOUT) / (1.0 - WITHOUT)
    beta = LAST + 0.5 * (FIRST - LAST) * (1.0 + np.cos(np.pi * passed))
    away = 2.0 * share - 1.0
    return -2.0 * beta * np.sign(away) * np.abs(away) ** (beta - 1.0)
