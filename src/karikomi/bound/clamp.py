"""Clamp: every weight stays within a fixed interval."""

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
    formula="w = clamp(w, -limit, limit), entry by entry",
    source="Arjovsky, Chintala and Bottou 2017, Wasserstein GAN (weight clipping)",
)
@dataclass(frozen=True, slots=True)
class Clamp(Stateless):
    """Keep every weight in ``[-limit, limit]``.

    ``w = min(max(w, -limit), limit)``, after every step. Acts on every floating tensor it is given.

    `limit`: > 0, in units of one weight, or a schedule; ``inf`` measures only. Raises
    `InvalidArgument` for a limit that is negative, zero or NaN. Stateless and idempotent.

    >>> import numpy as np, karikomi as kk
    >>> weights, outcome, state = kk.numpy.bound({"w": np.array([0.5, -2.0])}, Clamp(1.0))
    >>> weights["w"].tolist(), outcome.share_at_bound
    ([0.5, -1.0], 0.5)

    Source: Arjovsky, Chintala and Bottou 2017, algorithm 1, there with limit 0.01 on the critic.
    """

    limit: float | Schedule

    scope = Scope.ELEMENT
    of = Quantity.WEIGHT

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="Clamp"))

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return the limit for every tensor; `norms` are largest magnitudes."""
        limit = value_at(self.limit, facts["step"], xp=xp)
        return Decision(None, limit * xp.ones_like(norms), leave(xp)), state
