"""Max-norm: the weights into one unit stay within a ball."""

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
    shrink_to,
)
from karikomi.schedule import Schedule, value_at


@register(
    "bound",
    formula="w_u = w_u * min(1, limit / |w_u|) for every output unit u, |w_u|: the p-norm, p = 2 unless given",
    source="Srebro and Shraibman 2005; Srivastava et al. 2014, Dropout, section 5.1",
)
@dataclass(frozen=True, slots=True)
class MaxNorm(Stateless):
    """Keep the norm of the weights into every output unit at or below the limit.

    ``w_u = w_u * min(1, limit / |w_u|)``; a unit within the ball keeps its bits. What one unit is
    comes from the layer's type (a row of a Linear, a filter of a Conv); biases and gains are left
    alone, but not per tensor: there every floating tensor that is given has its ball.

    `limit`: > 0, in units of the norm, or a schedule; ``inf`` measures only. `per`: ``"unit"``,
    ``"tensor"`` for one ball per tensor, or ``"global"`` for one around all tensors together. `norm`: p of the
    p-norm, from 1 to ``inf``; with another than 2 the scaled weights are on the ball, but not its nearest point (for
    p = 1 see `L1Ball`). Raises `InvalidArgument` for a limit that is negative, zero or NaN, and for other values.
    Stateless, and idempotent in float32 and float64.

    >>> import numpy as np, karikomi as kk
    >>> weights = {"w": np.array([[3.0, 4.0], [0.0, 1.0]])}
    >>> bounded, outcome, state = kk.numpy.bound(weights, MaxNorm(2.5), unit_axes={"w": 0})
    >>> bounded["w"].tolist(), outcome.share_at_bound
    ([[1.5, 2.0], [0.0, 1.0]], 0.5)

    Source: Srebro and Shraibman 2005; Srivastava et al. 2014 (limits 3 to 4). Deviation from Keras'
    ``MaxNorm``: that multiplies always, by limit / (norm + 1e-7), and so drifts below the limit.
    """

    limit: float | Schedule
    _: KW_ONLY
    per: str = "unit"
    norm: float = 2.0

    of = Quantity.WEIGHT

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="MaxNorm"))
        check_extent(self.per, where="MaxNorm(per)")
        object.__setattr__(self, "norm", check_order(self.norm, where="MaxNorm"))

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
        """Return one factor per unit."""
        limit = value_at(self.limit, facts["step"], xp=xp)
        return Decision(shrink_to(norms, limit, xp=xp, slack=SLACK), None, leave(xp)), state
