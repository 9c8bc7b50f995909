"""Scores of weights and groups, formulas on blocks of arrays of any framework; the lowest are removed first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from karikomi import registry
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.rule import Array, Namespace


class Score:
    """What scores share. A score of weights has `of_weights`, one of groups alone only `of_groups`.

    `needs`: names of facts. `within_rows`: compare the weights of one output only with each other.
    `rounds`: into how many exponential rounds of measuring and removing the way to the sparsity is cut.
    `of_tensors`: a weight's worth depends on its whole tensor, which `of_tensor` is given.
    `updates`: it also changes the weights that stay, by reconstruction.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    of_units_only: ClassVar[bool] = False
    within_rows: ClassVar[bool] = False
    of_tensors: ClassVar[bool] = False
    updates: ClassVar[bool] = False
    rounds: int = 1

    def of_weights(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return one float per weight: elementwise, so any block of a tensor can be given.

        Called by several threads at once where there are many weights, and more than once for each.
        `weights`: float32, any shape. `facts`: name -> array of the same shape.
        """
        raise Unsupported(
            f"{type(self).__name__} scores units, not single weights",
            where="score",
            hint='pattern="units"',
        )

    def of_tensor(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return one float per weight of a whole tensor, in its shape."""
        return self.of_weights(weights, facts, xp=xp)

    def of_groups(self, weights: Array, facts: Mapping[str, Array], *, xp: Namespace) -> Array:
        """Return one float per group of weights: the sum over its weights, unless said otherwise.

        `weights`: shape (groups, weights of a group), float64 where the device has it. `facts`: arrays
        of the same shape, and for facts of units of shape (groups,).
        """
        return xp.sum(self.of_weights(weights, facts, xp=xp), axis=1)


def as_score(score: str | Score) -> Score:
    """Return a score, given one or its registered name; raises `UnknownName` or `InvalidArgument`."""
    if isinstance(score, Score):
        return score
    if not isinstance(score, str):
        raise InvalidArgument(
            "not a score",
            where="score",
            got=repr(score)[:80],
            allowed="a registered name, or such as kk.prune.Random(seed=1)",
        )
    made: Any = registry.find("score", score)()
    return made
