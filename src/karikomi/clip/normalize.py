"""Automatic clipping: every gradient gets the same norm, nearly, so that no limit has to be tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.clip.arguments import SCOPES, check_choice, check_number
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
    "clip",
    formula="g = g * limit / (|g| + gamma)",
    source="Bu, Wang, Zha and Karypis 2022, Automatic Clipping: Differentially Private Deep Learning Made "
    "Easier and Stronger",
)
@dataclass(frozen=True, slots=True)
class Normalize(Stateless):
    """Scale every gradient to nearly the norm `limit`, small ones up as well as large ones down.

    ``g = g * limit / (n + gamma)``. Below ``limit - gamma`` this enlarges, which no other rule does; the
    norm afterwards is below the limit. The limit and the learning rate of plain SGD are then one number.

    `limit`: > 0, in units of a norm, or a schedule of the attempted step; ``inf`` measures only. `gamma`:
    > 0, in units of a norm: gradients well below it stay small instead of becoming directions without
    meaning. `per`: ``"global"`` for one factor from the joint norm, ``"tensor"`` for each tensor on its own.
    Raises `InvalidArgument` for other values. Stateless.

    >>> import numpy as np, karikomi as kk
    >>> grads, outcome, state = kk.numpy.clip({"w": np.array([3.0])}, Normalize(1.0, gamma=1.0))
    >>> grads["w"].tolist()
    [0.75]

    Source: Bu et al. 2022, AUTO-S, with its gamma; there the gradient is that of one sample, here it is
    that of the batch.
    """

    limit: float | Schedule = 1.0
    _: KW_ONLY
    gamma: float = 0.01
    per: str = "global"

    of = Quantity.GRADIENT
    by_design = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="Normalize"))
        gamma = check_number(self.gamma, "gamma", where="Normalize", low=0.0, open_low=True)
        object.__setattr__(self, "gamma", gamma)
        check_choice(self.per, "per", SCOPES, where="Normalize")

    @property
    def scope(self) -> Scope:
        """Global or tensor, as `per` says."""
        return SCOPES[self.per]

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return one factor per number."""
        limit = value_at(self.limit, facts["step"], xp=xp)
        ones = xp.ones_like(norms)
        acts = (norms > 0) & (limit > 0) & xp.isfinite(limit)
        return Decision(xp.where(acts, limit / (norms + self.gamma), ones), None, leave(xp)), state
