"""Max-norm: the weights into one unit stay within a ball."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from niwaki.errors import InvalidArgument
from niwaki.registry import register
from niwaki.rule import (
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
from niwaki.schedule import Schedule, value_at

_SLACK = 1e-6  # the rounding of a float32 unit that was just scaled onto the ball


@register(
    "bound",
    formula="w_u = w_u * min(1, limit / |w_u|) for every output unit u",
    source="Srebro and Shraibman 2005; Srivastava et al. 2014, Dropout, section 5.1",
)
@dataclass(frozen=True, slots=True)
class MaxNorm(Stateless):
    """Keep the L2 norm of the weights into every output unit at or below the limit.

    ``w_u = w_u * min(1, limit / |w_u|)``; a unit within the ball keeps its bits. What one unit is
    comes from the layer's type (a row of a Linear, a filter of a Conv); biases and gains are left alone.

    `limit`: > 0, in units of the norm, or a schedule; ``inf`` measures only. `per`: ``"unit"``, or
    ``"tensor"`` for one ball per tensor. Raises `InvalidArgument` for a limit that is negative, zero
    or NaN, and for another `per`. Stateless, and idempotent in float32 and float64.

    >>> import numpy as np, niwaki as nw
    >>> weights = {"w": np.array([[3.0, 4.0], [0.0, 1.0]])}
    >>> bounded, outcome, state = nw.numpy.bound(weights, MaxNorm(2.5), unit_axes={"w": 0})
    >>> bounded["w"].tolist(), outcome.share_at_bound
    ([[1.5, 2.0], [0.0, 1.0]], 0.5)

    Source: Srebro and Shraibman 2005; Srivastava et al. 2014 (limits 3 to 4). Deviation from Keras'
    ``MaxNorm``: that multiplies always, by limit / (norm + 1e-7), and so drifts below the limit.
    """

    limit: float | Schedule
    _: KW_ONLY
    per: str = "unit"

    of = Quantity.WEIGHT

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="MaxNorm"))
        if self.per not in ("unit", "tensor"):
            raise InvalidArgument(
                "unknown extent of the ball",
                where="MaxNorm(per)",
                got=repr(self.per),
                allowed="'unit', 'tensor'",
            )

    @property
    def scope(self) -> Scope:
        """One number per output unit, or per tensor."""
        return Scope.UNIT if self.per == "unit" else Scope.TENSOR

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
        return Decision(shrink_to(norms, limit, xp=xp, slack=_SLACK), None, leave(xp)), state
