"""LAMP, as a score, and as the allocation that counts what a global ranking by it takes from each tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.prune.allocations.allocation import Pool, Tensor, by_quota, check_sparsity
from karikomi.prune.allocations.shares import known
from karikomi.prune.scores.score import Score
from karikomi.registry import register
from karikomi.rule import Array, Namespace

FORMULA = "w^2 / sum of w^2 over all weights of the tensor that are not smaller"
SOURCE = "Lee et al. 2021, Layer-adaptive Sparsity for the Magnitude-based Pruning"


@register("score", name="lamp", formula=FORMULA, source=SOURCE)
@dataclass(frozen=True, slots=True)
class LAMP(Score):
    """The share that a weight has in what is left of its tensor when all smaller ones are gone.

    ``w_i^2 / (sum of w_j^2 over j from i on)``, the weights sorted upwards; equal ones by index. The
    largest of a tensor has 1, so a global ranking keeps it. A group counts by its sum of squares. The
    order of a whole tensor is needed: `of_tensor` and `of_groups` are given all of it at once, and
    blocks of a tensor are refused. A tensor of zeros scores 0.

    >>> import numpy as np
    >>> LAMP().of_tensor(np.array([2.0, -1.0, 1.0]), {}, xp=np).round(4).tolist()
    [1.0, 0.1667, 0.2]

    Source: Lee, Park, Mo, Ahn and Shin 2021, "Layer-adaptive Sparsity for the Magnitude-based
    Pruning", eq. 3 and 4.
    """

    of_tensors: ClassVar[bool] = True

    def of_weights(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Raise `Unsupported`: the score of a weight depends on the whole tensor."""
        raise Unsupported(
            "LAMP needs the order of a whole tensor, and is given a block of it",
            where="score",
            hint='score="magnitude", allocation="lamp" takes the same weights',
        )

    def of_tensor(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return one float per weight of a whole tensor, in its shape; float64 is advised."""
        flat = xp.reshape(weights, (-1,))
        return xp.reshape(_shares(flat * flat, xp), weights.shape)

    def of_groups(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return one float per group, all groups of the tensor being given."""
        return _shares(xp.sum(weights * weights, axis=1), xp)


@register(
    "allocation",
    name="lamp",
    formula=f"from each tensor as many as one ranking of all by {FORMULA} takes",
    source=SOURCE,
)
def layer_adaptive(tensors: Mapping[str, Tensor], sparsity: float) -> list[Pool]:
    """Return one pool per tensor, as large as a global ranking by LAMP makes it.

    Items count by the squares of their scores; within a tensor LAMP ranks as the scores do, so each
    pool takes its lowest scores. ``round(sparsity * items)`` go in all, ties by tensor order, and at
    least one stays per tensor. All scores are in memory at once, 8 bytes each.
    Raises `InvalidArgument` for a sparsity outside of [0, 1) or out of reach, for tensors without
    scores, and for negative scores, which have no share in a sum.

    >>> large = Tensor(items=3, scores=lambda: np.array([1.0, 2.0, 3.0], np.float32))
    >>> small = Tensor(items=3, scores=lambda: np.array([0.1, 0.1, 0.1], np.float32))
    >>> layer_adaptive({"large": large, "small": small}, 0.5)
    [Pool(names=('large',), remove=2), Pool(names=('small',), remove=1)]

    Source: Lee, Park, Mo, Ahn and Shin 2021, "Layer-adaptive Sparsity for the Magnitude-based
    Pruning"; ties and the exact total are ours.
    """
    check_sparsity(sparsity)
    scores = known(tensors, "scores", where="lamp", hint="the scores of its items, as a function")
    ranked = {name: _ascending(name, values()) for name, values in scores.items()}
    total = sum(tensor.items for tensor in tensors.values())
    remove = min(
        round(sparsity * total), sum(max(tensor.items - 1, 0) for tensor in tensors.values())
    )
    counts = dict(zip(ranked, _lowest(list(ranked.values()), remove), strict=True))
    shares = {name: counts[name] / max(tensor.items, 1) for name, tensor in tensors.items()}
    return by_quota(tensors, shares, sparsity, where="lamp")


def _shares(energies: Array, xp: Namespace) -> Array:
    order = xp.argsort(energies, stable=True)
    ascending = xp.take(energies, order, axis=0)
    left = xp.flip(xp.cumulative_sum(xp.flip(ascending, axis=0), axis=0), axis=0)
    shares = ascending / xp.where(left > 0.0, left, xp.ones_like(left))
    return xp.take(shares, xp.argsort(order, stable=True), axis=0)


def _ascending(name: str, scores: np.ndarray) -> np.ndarray:
    """Return the LAMP scores of a tensor sorted upwards; the last, which stays, is infinite."""
    values = np.sort(scores.astype(np.float64))
    if len(values) and not values[0] >= 0.0:
        raise InvalidArgument(
            "LAMP ranks scores by their share in a sum, and cannot rank negative ones",
            where=f"lamp: {name}",
            got=values[0],
            allowed="scores >= 0, such as magnitude",
        )
    values *= values
    left = np.cumsum(values[::-1])[::-1]
    np.divide(values, left, out=values, where=left > 0.0)
    values[-1:] = np.inf
    return values


def _lowest(ranked: Sequence[np.ndarray], remove: int) -> list[int]:
    """Return how many of each sorted array are among the `remove` smallest of all."""
    # Positive floats sort like their bits: halving these meets the exact value in 63 steps.
    low, high = 0, int(np.float64(1.0).view(np.int64))
    while low < high:
        middle = (low + high) // 2
        if _below(ranked, np.int64(middle).view(np.float64), "right") >= remove:
            high = middle
        else:
            low = middle + 1
    value = np.int64(low).view(np.float64)
    ties = remove - _below(ranked, value, "left")
    counts = []
    for values in ranked:
        under = int(np.searchsorted(values, value, "left"))
        equal = min(int(np.searchsorted(values, value, "right")) - under, max(ties, 0))
        counts.append(under + equal)
        ties -= equal
    return counts


def _below(ranked: Sequence[np.ndarray], value: np.float64, side: str) -> int:
    return sum(int(np.searchsorted(values, value, side)) for values in ranked)  # type: ignore[call-overload]
