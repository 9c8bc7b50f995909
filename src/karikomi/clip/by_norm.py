"""Clip by norm: every tensor, or every output unit, is scaled on its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.clip.arguments import EXTENTS, check_choice, check_order
from karikomi.registry import register
from karikomi.rule import (
    Array,
    Decision,
    Namespace,
    Quantity,
    Scope,
    State,
    Stateless,
    brief,
    check_limit,
    leave,
    shrink_to,
)
from karikomi.schedule import Schedule, value_at


@register(
    "clip",
    formula="g_i = g_i * min(1, limit / |g_i|) for every tensor (or unit) i, |g_i|: the p-norm, p = 2 unless given",
    source="Pascanu, Mikolov and Bengio 2013, applied per tensor (as Keras' clipnorm)",
)
@dataclass(frozen=True, slots=True)
class ByNorm(Stateless):
    """Scale every tensor whose own norm exceeds the limit down to it.

    ``g_i = g_i * min(1, limit / |g_i|)`` for each tensor i, with ``|g| = (sum |x|^p)^(1/p)``. The direction
    within a tensor stays, the proportions between tensors change; for one factor for all see `ByGlobalNorm`.

    `limit`: > 0, in units of the norm of one tensor, a number, an array of one number, or a schedule of the
    attempted step; ``inf`` measures only. `norm`: p, from 1 to ``inf`` (the largest magnitude). `per`:
    ``"tensor"``, or ``"unit"`` for each output unit (a row of a linear layer, a filter of a convolution) on its
    own. Raises `InvalidArgument` for a limit that is negative, zero or NaN, and for other values. Stateless.

    >>> import numpy as np, karikomi as kk
    >>> grads, outcome, state = kk.numpy.clip({"a": np.array([3.0, 4.0]), "b": np.ones(1)}, ByNorm(1.0))
    >>> [round(float(x), 3) for x in grads["a"]], grads["b"].tolist()
    ([0.6, 0.8], [1.0])
    >>> rows = {"w": np.array([[3.0, 4.0], [0.0, 1.0]])}
    >>> kk.numpy.clip(rows, ByNorm(2.0, norm="inf", per="unit"), unit_axes={"w": 0})[0]["w"].tolist()
    [[1.5, 2.0], [0.0, 1.0]]

    Source: Pascanu, Mikolov and Bengio 2013, algorithm 1, on each tensor; ``tf.clip_by_norm``, Keras'
    ``clipnorm``. Deviation: a norm that equals the limit is left bit for bit alone.
    """

    limit: float | Schedule
    _: KW_ONLY
    norm: float = 2.0
    per: str = "tensor"

    of = Quantity.GRADIENT

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="ByNorm"))
        object.__setattr__(self, "norm", check_order(self.norm, where="ByNorm"))
        check_choice(self.per, "per", EXTENTS, where="ByNorm")

    @property
    def scope(self) -> Scope:
        """One number per tensor, or per output unit."""
        return EXTENTS[self.per]

    def __repr__(self) -> str:
        return brief(self)

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
        """Return one factor per tensor, or per unit."""
        limit = value_at(self.limit, facts["step"], xp=xp)
        return Decision(shrink_to(norms, limit, xp=xp), None, leave(xp)), state
