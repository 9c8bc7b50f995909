"""The score that the caller has computed: an array per weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from karikomi.prune.scores.score import Score
from karikomi.registry import register
from karikomi.rule import Array, Namespace


@register(
    "score",
    name="importance",
    formula="the numbers of importance={name: array}; a group: their sum",
    source="Paganini and Forde 2020, Streamlining Tensor and Network Pruning in PyTorch",
)
@dataclass(frozen=True, slots=True)
class Importance(Score):
    """What the caller passes as ``importance={name: array}``, as it is: the lowest numbers go first.

    Any real numbers, negative ones too, in the shape of the weight or one that broadcasts to it. A group has the
    sum. Weights without an array are left alone, by name.

    >>> import numpy as np
    >>> worth = {"importance": np.array([0.3, -2.0])}
    >>> Importance().of_weights(np.array([5.0, 5.0]), worth, xp=np).tolist()
    [0.3, -2.0]

    Source: the ``importance_scores`` of Paganini and Forde 2020, "Streamlining Tensor and Network Pruning in
    PyTorch". Deviation: ``torch.nn.utils.prune.L1Unstructured`` ranks by their magnitudes.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"importance"})

    def of_weights(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return the caller's numbers."""
        return facts["importance"]
