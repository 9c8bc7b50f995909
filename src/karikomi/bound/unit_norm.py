"""Unit norm: the weights into one unit stay on a sphere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.bound.extent import SLACK, check_extent, scope_of
from karikomi.clip.arguments import check_order
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

_NOTHING = (
    1e-30  # of the limit: from less no direction can be taken, and 1 / less overflows float32
)


@register(
    "bound",
    formula="w_u = w_u * limit / |w_u| for every output unit u that is not zero",
    source="Salimans and Kingma 2016, Weight Normalization, as a projection; Keras' UnitNorm",
)
@dataclass(frozen=True, slots=True)
class UnitNorm(Stateless):
    """Bring the norm of the weights into every output unit to the limit exactly, from both sides.

    ``w_u = w_u * limit / |w_u|``: short units grow, long ones shrink, a unit of zeros (or shorter than
    1e-30 of the limit) stays. What one unit is comes from the layer's type; biases and gains are left
    alone, but not per tensor: there every floating tensor that is given has its sphere.

    `limit`: > 0, in units of the norm, or a schedule; ``inf`` measures only. `per`: ``"unit"``,
    ``"tensor"`` for one sphere per tensor, or ``"global"`` for one around all tensors together. `norm`: p of the
    p-norm, from 1 to ``inf``. Raises `InvalidArgument` for a limit that is negative, zero or NaN, and for other
    values. Stateless, and idempotent in float32 and float64.

    >>> import numpy as np, karikomi as kk
    >>> weights = {"w": np.array([[3.0, 4.0], [0.0, 0.5], [0.0, 0.0]])}
    >>> bounded, outcome, state = kk.numpy.bound(weights, UnitNorm(), unit_axes={"w": 0})
    >>> bounded["w"].round(3).tolist(), round(outcome.share_at_bound, 3)
    ([[0.6, 0.8], [0.0, 1.0], [0.0, 0.0]], 0.667)

    Source: the projection form of weight normalisation; Keras' ``UnitNorm``. Deviations from Keras: no
    epsilon in the denominator (there every call leaves a norm of n / (n + 1e-7)), and the axis is that
    of the output unit for every type of layer.
    """

    limit: float | Schedule = 1.0
    _: KW_ONLY
    per: str = "unit"
    norm: float = 2.0

    of = Quantity.WEIGHT

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="UnitNorm"))
        check_extent(self.per, where="UnitNorm(per)")
        object.__setattr__(self, "norm", check_order(self.norm, where="UnitNorm"))

    @property
    def scope(self) -> Scope:
        """One number per output unit or tensor, or one for all."""
        return scope_of(self.per)

    @property
    def order(self) -> float:
        """The p of the norms that are measured."""
        return self.norm

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return one factor per unit, above 1 for units that are too short."""
        limit = value_at(self.limit, facts["step"], xp=xp)
        off = (norms > limit * (1.0 + SLACK)) | (norms < limit * (1.0 - SLACK))
        moved = off & (norms > limit * _NOTHING) & (limit > 0)
        ones = xp.ones_like(norms)
        factor = xp.where(moved, limit / xp.where(moved, norms, ones), ones)
        return Decision(factor, None, leave(xp)), state
