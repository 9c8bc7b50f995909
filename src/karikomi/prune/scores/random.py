"""Random scores: the floor under every other score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from karikomi.errors import InvalidArgument
from karikomi.prune.scores.score import Score
from karikomi.registry import register
from karikomi.rule import Array, Namespace
from karikomi.schedule import whole


@register(
    "score",
    name="random",
    formula="uniform random numbers in (0, 1], from the seed and the tensor's name",
    source="Gale, Elsen and Hooker 2019, The State of Sparsity in Deep Neural Networks",
)
@dataclass(frozen=True, slots=True)
class Random(Score):
    """A random number for each weight; a group has that of its first weight.

    So every item is as likely to go as any other, however many weights it has.

    `seed`: a whole number, 0 <= seed < 2^64, else `InvalidArgument`; the same seed and names give the same scores.

    >>> import numpy as np
    >>> noise = {"noise": np.array([[0.3, 0.9], [0.7, 0.1]])}
    >>> Random(seed=1).of_groups(np.ones((2, 2)), noise, xp=np).tolist()
    [0.3, 0.7]

    Source: the baseline of Gale, Elsen and Hooker 2019, "The State of Sparsity in Deep Neural Networks".
    """

    needs: ClassVar[frozenset[str]] = frozenset({"noise"})
    seed: int = 0

    def __post_init__(self) -> None:
        seed = whole(self.seed)
        if seed is None or not 0 <= seed < 1 << 64:
            raise InvalidArgument(
                "the seed is a whole number",
                where="Random.seed",
                got=repr(self.seed),
                allowed="0 <= seed < 2^64",
            )

    def of_weights(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return the noise."""
        return facts["noise"]

    def of_groups(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return the noise of the first weight of each group."""
        return facts["noise"][:, 0]
