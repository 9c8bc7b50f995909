"""Half-space: a weighted sum of the weights stays at or below an offset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from karikomi.bound.entries import Given, as_given, by_name, check_names, has_names
from karikomi.bound.extent import check_extent, scope_of
from karikomi.bound.nearest_point import NearestPoint
from karikomi.clip.arguments import check_flag, check_number
from karikomi.errors import InvalidArgument
from karikomi.registry import register
from karikomi.rule import (
    Scope,
)


@register(
    "bound",
    formula="w = w - max(<a, w> - b, 0) / |a|^2 * a",
    source="projection onto a half-space, Boyd and Vandenberghe 2004, Convex Optimization, 8.1.1",
)
@dataclass(frozen=True, slots=True)
class HalfSpace(NearestPoint):
    """Keep a weighted sum of the weights at or below an offset, by the nearest such weights.

    ``w = w - max(<a, w> - b, 0) / |a|^2 * a`` with the normal a and the offset b.

    `normal`: a number for all entries, an array that goes with every selected tensor, or a mapping from names or
    globs to these; tensors that it does not name are left alone, with the reason. `offset`: b, any finite number.
    `per`: ``"tensor"`` for a half-space for each, ``"global"`` for one around all of them together. `equal`: whether
    the sum is brought to the offset from both sides (a hyperplane). Raises `InvalidArgument` for other values and
    for a normal of zeros, `UnknownName` for a glob that matches no tensor. Stateless, and idempotent in float32 and
    float64. The numbers of its outcome are how far each tensor was from the half-space, in L2 norm.

    >>> import numpy as np, karikomi as kk
    >>> bounded, outcome, _ = kk.numpy.bound({"w": np.array([3.0, 1.0])}, HalfSpace(1.0, 2.0))
    >>> bounded["w"].tolist(), round(outcome.pre, 3)
    ([2.0, 0.0], 1.414)

    Source: Boyd and Vandenberghe 2004; ``optax.projections.projection_halfspace`` and ``projection_hyperplane`` are
    ``per="global"``.
    """

    normal: Given
    offset: float
    _: KW_ONLY
    per: str = "tensor"
    equal: bool = False

    nearest = "half_space"

    def __post_init__(self) -> None:
        normal = as_given(self.normal, where="HalfSpace(normal)")
        if normal is None or normal == 0.0:
            raise InvalidArgument("a normal is not zero", where="HalfSpace", got=repr(self.normal))
        object.__setattr__(self, "normal", normal)
        low = -1.7976931348623157e308
        offset = check_number(self.offset, "the offset", where="HalfSpace", low=low)
        object.__setattr__(self, "offset", offset)
        check_extent(self.per, where="HalfSpace(per)", extents=("tensor", "global"))
        check_flag(self.equal, "equal", where="HalfSpace")

    @property
    def scope(self) -> Scope:
        """One number per tensor, or one for all."""
        return scope_of(self.per)

    @property
    def has_names(self) -> bool:
        """Whether tensors are named."""
        return has_names(self.normal)

    def check_names(self, names: Iterable[str]) -> None:
        """Raise `UnknownName` for a name or glob that matches none of these."""
        check_names(self.normal, names, where="HalfSpace(normal)")

    def given_for(self, names: Iterable[str]) -> dict[str, Any]:
        """Return name -> the normal of a tensor, a number or an array; without the tensors that have none."""
        return by_name(self.normal, names, where="HalfSpace(normal)")
