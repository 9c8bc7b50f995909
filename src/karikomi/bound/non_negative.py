"""Non-negative weights: what is below zero becomes zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from karikomi.registry import register
from karikomi.rule import (
    Array,
    Decision,
    Namespace,
    Quantity,
    Scope,
    State,
    Stateless,
    leave,
)


@register(
    "bound",
    formula="w = max(w, 0), entry by entry",
    source="projected gradient; Lee and Seung 1999 (why non-negative weights); Keras' NonNeg",
)
@dataclass(frozen=True, slots=True)
class NonNegative(Stateless):
    """Keep every weight at or above zero.

    ``w = max(w, 0)``, after every step: the negative part is measured, and scaled by a factor of 0.
    Gains of normalisation layers are spared unless they are selected; biases are usually excluded by name. The
    numbers of its outcome are how far each tensor reached below zero.

    No arguments. Stateless and idempotent. The share at the bound is the share of zeros.

    >>> import numpy as np, karikomi as kk
    >>> weights, outcome, state = kk.numpy.bound({"w": np.array([0.5, -2.0])}, NonNegative())
    >>> weights["w"].tolist(), outcome.pre, outcome.share_at_bound
    ([0.5, 0.0], 2.0, 0.5)

    Source: projected gradient descent on the orthant; Lee and Seung 1999 for its use; Keras' ``NonNeg``.
    """

    scope = Scope.ELEMENT
    of = Quantity.WEIGHT
    needs = frozenset({"negative_part"})

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return a factor of 0 for every negative part that there is."""
        ones = xp.ones_like(norms)
        return Decision(xp.where(norms > 0, 0.0 * ones, ones), None, leave(xp)), state
