"""Scores of weights by the weights themselves: nothing needs to be measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from karikomi.prune.scores.score import Score
from karikomi.registry import register
from karikomi.rule import Array, Namespace

ROWS = 1024
"""Units whose distances to all others are in memory at once."""


@register(
    "score",
    name="magnitude",
    formula="|w|; a group: sum |w| (its L1 norm)",
    source="Han, Pool, Tran and Dally 2015, Learning both Weights and Connections",
)
@dataclass(frozen=True, slots=True)
class Magnitude(Score):
    """The magnitude of a weight, the L1 norm of a group: what is nearest to zero goes first.

    >>> import numpy as np
    >>> Magnitude().of_weights(np.array([-2.0, 0.5]), {}, xp=np).tolist()
    [2.0, 0.5]
    >>> Magnitude().of_groups(np.array([[-2.0, 0.5], [1.0, 1.0]]), {}, xp=np).tolist()
    [2.5, 2.0]

    Source: Han, Pool, Tran and Dally 2015, "Learning both Weights and Connections for Efficient
    Neural Networks"; of filters: Li et al. 2017, "Pruning Filters for Efficient ConvNets".
    """

    def of_weights(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return ``|w|``."""
        return xp.abs(weights)


@register(
    "score",
    name="l2",
    formula="a group: sqrt(sum w^2) (its L2 norm); a single weight: |w|",
    source="He et al. 2018, Soft Filter Pruning",
)
@dataclass(frozen=True, slots=True)
class L2Norm(Score):
    """The L2 norm of a group, which one large weight can carry; of a single weight its magnitude.

    The largest magnitude is taken out of the sum first, so that no square overflows or vanishes.

    >>> import numpy as np
    >>> L2Norm().of_groups(np.array([[3.0, -4.0], [5e200, 0.0]]), {}, xp=np).tolist()
    [5.0, 5e+200]

    Source: He et al. 2018, "Soft Filter Pruning for Accelerating Deep Convolutional Neural
    Networks", there with p = 2.
    """

    def of_weights(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return ``|w|``."""
        return xp.abs(weights)

    def of_groups(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return ``sqrt(sum w^2)``."""
        largest = xp.max(xp.abs(weights), axis=1)
        unit = xp.where(largest > 0.0, largest, xp.ones_like(largest))
        scaled = weights / unit[:, None]
        return largest * xp.sqrt(xp.sum(scaled * scaled, axis=1))


@register(
    "score",
    name="fpgm",
    formula="a unit: sum over the other units of ||w_unit - w_other||_2",
    source="He et al. 2019, Filter Pruning via Geometric Median",
)
@dataclass(frozen=True, slots=True)
class FPGM(Score):
    """How far a unit lies from all others of its tensor: what the others can stand in for goes first.

    ``sum over j of ||w_i - w_j||_2``, which is least next to the geometric median. Measured on the
    weights as they are: w and -w are far apart. All units of a tensor must be given at once; their
    distances come from inner products around the mean unit, so that in float64 twins, or a unit and
    itself, may come out 1e-8 of their norm apart, and not exactly zero.

    >>> import numpy as np
    >>> FPGM().of_groups(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), {}, xp=np).round(6).tolist()
    [5.0, 10.0, 5.0]

    Source: He, Liu, Wang, Hu and Yang 2019, "Filter Pruning via Geometric Median for Deep
    Convolutional Neural Networks Acceleration", eq. 8.
    """

    of_units_only: ClassVar[bool] = True
    of_tensors: ClassVar[bool] = True

    def of_groups(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return each unit's sum of distances to the others."""
        centred = weights - xp.mean(weights, axis=0, keepdims=True)
        squares = xp.sum(centred * centred, axis=1)
        sums = []
        for start in range(0, weights.shape[0], ROWS):
            stop = min(start + ROWS, weights.shape[0])
            apart = squares[start:stop, None] + squares[None, :]
            apart = apart - 2.0 * (centred[start:stop, :] @ centred.T)
            distances = xp.sqrt(xp.where(apart > 0.0, apart, xp.zeros_like(apart)))
            sums.append(xp.sum(distances, axis=1))
        return xp.concat(sums)
