"""Smooth clipping: a gradient is shrunk the more the larger it is, without a corner at the limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.clip.arguments import SCOPES, check_choice
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
    formula="g = g * limit / (|g| + limit)",
    source="Zhang, He, Sra and Jadbabaie 2020, Why Gradient Clipping Accelerates Training",
)
@dataclass(frozen=True, slots=True)
class Smooth(Stateless):
    """Scale by ``limit / (norm + limit)``: small gradients nearly stay, large ones tend to the limit.

    ``g = g * limit / (n + limit)``. The norm afterwards is below the limit, and half of it at ``n = limit``.
    Every gradient is shrunk, so that every step is a clipped one.

    `limit`: > 0, in units of a norm, or a schedule of the attempted step; ``inf`` measures only. `per`:
    ``"global"`` for one factor from the joint norm, ``"tensor"`` for each tensor on its own. Raises
    `InvalidArgument` for other values. Stateless.

    >>> import numpy as np, karikomi as kk
    >>> grads, outcome, state = kk.numpy.clip({"w": np.array([3.0])}, Smooth(1.0))
    >>> grads["w"].tolist(), outcome.post
    ([0.75], 0.75)

    Source: Zhang et al. 2020, where normalised and clipped steps differ by at most a factor of 2.
    """

    limit: float | Schedule
    _: KW_ONLY
    per: str = "global"

    of = Quantity.GRADIENT
    by_design = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="Smooth"))
        check_choice(self.per, "per", SCOPES, where="Smooth")

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
        ones = xp.ones_like(norms)
        limit = value_at(self.limit, facts["step"], xp=xp) * ones
        larger = xp.maximum(norms, limit)
        # A ratio of at most 1 cannot overflow, and is 0 for an infinite limit.
        ratio = xp.minimum(norms, limit) / xp.where(larger > 0, larger, ones)
        factor = xp.where(norms > limit, ratio, ones) / (ones + ratio)
        return Decision(xp.where(limit > 0, factor, ones), None, leave(xp)), state
