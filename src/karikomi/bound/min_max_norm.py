"""Min-max norm: the weights into one unit stay between two spheres, or move towards them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.bound.extent import SLACK, check_extent, scope_of
from karikomi.clip.arguments import check_number
from karikomi.errors import InvalidArgument
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

_NOTHING = 1e-30  # of the lower end: from less no direction can be taken


@register(
    "bound",
    formula="w_u = w_u * (rate * min(max(|w_u|, low), high) + (1 - rate) * |w_u|) / |w_u| for every output unit u",
    source="Keras' MinMaxNorm (no paper); projected gradient descent",
)
@dataclass(frozen=True, slots=True)
class MinMaxNorm(Stateless):
    """Keep the L2 norm of the weights into every output unit between two ends, or bring it nearer step by step.

    With ``n = |w_u|``: ``w_u = w_u * (rate * min(max(n, low), high) + (1 - rate) * n) / n``. A unit between the ends
    keeps its bits, a unit of zeros stays.

    `low`, `high`: 0 <= low <= high, in units of the norm; `high` may be ``inf``. `rate`: above 0, up to 1, the share
    of the way that one step moves. `per`: ``"unit"``, ``"tensor"``, or ``"global"`` for the norm over all tensors.
    Raises `InvalidArgument` for other values. Stateless; with a rate of 1 idempotent in float32 and float64.

    >>> import numpy as np, karikomi as kk
    >>> weights = {"w": np.array([[3.0, 4.0], [0.0, 0.5], [0.0, 1.5]])}
    >>> bounded, outcome, _ = kk.numpy.bound(weights, MinMaxNorm(1.0, 2.0, rate=0.5), unit_axes={"w": 0})
    >>> bounded["w"].round(3).tolist()
    [[2.1, 2.8], [0.0, 0.75], [0.0, 1.5]]

    Source: Keras' ``MinMaxNorm``. Deviations: no epsilon in the denominator, and the axis is that of the output unit
    for every type of layer.
    """

    low: float = 0.0
    high: float = 1.0
    _: KW_ONLY
    rate: float = 1.0
    per: str = "unit"

    of = Quantity.WEIGHT

    def __post_init__(self) -> None:
        where = "MinMaxNorm"
        low = check_number(self.low, "low", where=where, low=0.0)
        high = self.high
        if high != float("inf"):
            high = check_number(high, "high", where=where, low=0.0, open_low=True)
        if high < low:
            raise InvalidArgument("low is above high", where=where, got=f"{low} and {high}")
        rate = check_number(self.rate, "rate", where=where, low=0.0, high=1.0, open_low=True)
        check_extent(self.per, where=f"{where}(per)")
        for name, value in {"low": low, "high": high, "rate": rate}.items():
            object.__setattr__(self, name, value)

    @property
    def scope(self) -> Scope:
        """One number per output unit or tensor, or one for all."""
        return scope_of(self.per)

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
        ones = xp.ones_like(norms)
        nearest = xp.minimum(xp.maximum(norms, self.low * ones), self.high * ones)
        short = (norms < self.low * (1.0 - SLACK)) & (norms > self.low * _NOTHING)
        moved = short | (norms > self.high * (1.0 + SLACK))
        safe = xp.where(moved, norms, ones)
        factor = self.rate * (nearest / safe) + (1.0 - self.rate)
        return Decision(xp.where(moved, factor, ones), None, leave(xp)), state
