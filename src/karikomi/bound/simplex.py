"""Simplex: weights stay non-negative with a given sum, as shares do."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from karikomi.bound.extent import check_extent, scope_of
from karikomi.bound.nearest_point import NearestPoint
from karikomi.registry import register
from karikomi.rule import (
    Scope,
    check_limit,
)
from karikomi.schedule import Schedule


@register(
    "bound",
    formula="w = max(w - t, 0) with t such that sum w = total",
    source="Duchi, Shalev-Shwartz, Singer and Chandra 2008, Efficient Projections onto the l1-Ball",
)
@dataclass(frozen=True, slots=True)
class Simplex(NearestPoint):
    """Keep weights non-negative with a given sum, by the nearest such weights.

    ``w = max(w - t, 0)`` with the one t for which ``sum w = total``: for weights that are shares, of mixtures and of
    ensembles.

    `total`: > 0, or a schedule; ``inf`` measures only. `per`: ``"tensor"``, ``"unit"`` for each output unit on its
    own (a row that sums to `total`), ``"global"`` for all tensors together. Raises `InvalidArgument` for other
    values. Stateless, and idempotent in float32 and float64. The numbers of its outcome are how far each tensor (or
    unit) was from the simplex, in L2 norm. An empty tensor is left as it is.

    >>> import numpy as np, karikomi as kk
    >>> bounded, outcome, _ = kk.numpy.bound({"w": np.array([0.9, 0.5, -1.0])}, Simplex())
    >>> bounded["w"].round(3).tolist()
    [0.7, 0.3, 0.0]

    Source: Duchi et al. 2008, figure 1 (sorting). ``optax.projections.projection_simplex`` is ``per="global"``.
    """

    total: float | Schedule = 1.0
    _: KW_ONLY
    per: str = "tensor"

    nearest = "simplex"

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", check_limit(self.total, where="Simplex"))
        check_extent(self.per, where="Simplex(per)")

    @property
    def scope(self) -> Scope:
        """One number per tensor or unit, or one for all."""
        return scope_of(self.per)
