"""L1 ball: the sum of magnitudes stays at or below the limit, by the nearest weights that have it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from karikomi.bound.extent import check_extent, scope_of
from karikomi.bound.nearest_point import NearestPoint
from karikomi.clip.arguments import check_flag
from karikomi.registry import register
from karikomi.rule import (
    Scope,
    check_limit,
)
from karikomi.schedule import Schedule


@register(
    "bound",
    formula="w = sign(w) * max(|w| - t, 0) with t >= 0 such that sum |w| <= limit",
    source="Duchi, Shalev-Shwartz, Singer and Chandra 2008, Efficient Projections onto the l1-Ball",
)
@dataclass(frozen=True, slots=True)
class L1Ball(NearestPoint):
    """Bring weights into the L1 ball by its nearest point, which sets small weights to zero.

    ``w = sign(w) * max(|w| - t, 0)`` with the least t >= 0 for which ``sum |w| <= limit``. Scaling, as `MaxNorm`
    does, would keep the zeros out; this projection makes them.

    `limit`: > 0, in units of a sum of magnitudes, or a schedule; ``inf`` measures only. `per`: ``"tensor"``,
    ``"unit"`` for each output unit on its own, ``"global"`` for one ball around all tensors together. `sphere`:
    whether weights inside are moved outwards too, to a sum that equals the limit (there a weight of 0 stays 0 only
    in a tensor of zeros). Raises `InvalidArgument` for other values. Stateless, and idempotent in float32 and
    float64. The numbers of its outcome are how far each tensor (or unit) was from the ball, in L2 norm.

    >>> import numpy as np, karikomi as kk
    >>> bounded, outcome, _ = kk.numpy.bound({"w": np.array([3.0, -2.0, 0.5])}, L1Ball(2.0))
    >>> bounded["w"].tolist(), round(outcome.pre, 3)
    ([1.5, -0.5, 0.0], 2.179)

    Source: Duchi et al. 2008, figure 1 (sorting). ``optax.projections.projection_l1_ball`` is ``per="global"``.
    """

    limit: float | Schedule
    _: KW_ONLY
    per: str = "tensor"
    sphere: bool = False

    nearest = "l1_ball"

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="L1Ball"))
        check_extent(self.per, where="L1Ball(per)")
        check_flag(self.sphere, "sphere", where="L1Ball")

    @property
    def scope(self) -> Scope:
        """One number per tensor or unit, or one for all."""
        return scope_of(self.per)
