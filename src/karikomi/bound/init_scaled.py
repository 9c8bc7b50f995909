"""Initialisation-scaled bounds: every weight stays within k times the range that it began in."""

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
    check_limit,
    leave,
)
from karikomi.schedule import Schedule, value_at


@register(
    "bound",
    formula="w = clamp(w, -k s, k s) with s = 1 / sqrt(fan_in) of the layer",
    source="Elsayed, Lan, Lyle and Mahmood 2024, Weight Clipping for Deep Continual and RL",
)
@dataclass(frozen=True, slots=True)
class InitScaled(Stateless):
    """Keep every weight and bias within k times its layer's range at initialisation.

    ``w = min(max(w, -k s), k s)`` with ``s = 1 / sqrt(fan_in)``, entry by entry, after every step. The
    fan-in is a fact of the layer, the same for its weight and its bias, whatever their rank. Tensors
    of layers without a fan-in (normalisation, embeddings, gains) are left alone, with the reason.

    `k`: > 0, in units of s, or a schedule; the paper tries 1 to 5; ``inf`` measures only. Raises
    `InvalidArgument` for a k that is negative, zero or NaN. Stateless and idempotent.

    >>> import numpy as np, karikomi as kk
    >>> weights = {"w": np.array([[0.5, -9.0, 0.0, 1.0]]), "b": np.array([9.0])}
    >>> bounded, outcome, state = kk.numpy.bound(weights, InitScaled(2.0), fan_in={"w": 4, "b": 4})
    >>> bounded["w"].tolist(), bounded["b"].tolist(), outcome.share_at_bound
    ([[0.5, -1.0, 0.0, 1.0]], [1.0], 0.6)

    Source: Elsayed, Lan, Lyle and Mahmood 2024, arXiv 2407.01704, algorithm 1. Deviation: the authors'
    code takes for a bias the fan-in of the last weight that the loop has met, which is that of another
    layer wherever biases do not follow their weights, and clips gains by it; here each has its own.
    """

    k: float | Schedule = 2.0

    scope = Scope.ELEMENT
    of = Quantity.WEIGHT
    needs = frozenset({"fan_in"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_limit(self.k, where="InitScaled"))

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return one limit per tensor; `norms` are largest magnitudes."""
        k = value_at(self.k, facts["step"], xp=xp)
        return Decision(None, k / xp.sqrt(facts["fan_in"]), leave(xp)), state
