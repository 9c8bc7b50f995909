"""Scores of weights by the inputs that they multiply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from karikomi.prune.scores.score import Score
from karikomi.registry import register
from karikomi.rule import Array, Namespace


@register(
    "score",
    name="wanda",
    formula="|w_ij| * ||x_j||_2, compared within one output i",
    source="Sun et al. 2024, A Simple and Effective Pruning Approach for Large Language Models",
)
@dataclass(frozen=True, slots=True)
class Wanda(Score):
    """A weight's magnitude times the norm of the input it multiplies, compared within each output.

    ``|w_ij| * ||x_j||_2`` over samples and positions (the fact ``input_norm``). A group: the sum.

    >>> import numpy as np
    >>> norms = np.array([[1.0, 10.0]])
    >>> Wanda().of_weights(np.array([[-2.0, 0.5]]), {"input_norm": norms}, xp=np).tolist()
    [[2.0, 5.0]]

    Source: Sun, Liu, Bair and Kolter 2024, "A Simple and Effective Pruning Approach for Large Language
    Models", eq. 1. The root of a mean over samples, as the authors' code has it, gives the same order.
    Convolutions (their input seen through the kernel) and groups are ours.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_norm"})
    within_rows: ClassVar[bool] = True

    def of_weights(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return ``|w| * ||x||``."""
        return xp.abs(weights) * facts["input_norm"]
