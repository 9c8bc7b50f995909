"""Clip by global norm: one factor for all tensors, so that the direction of the step stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

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
    brief,
    check_limit,
    leave,
    shrink_to,
)
from karikomi.schedule import Schedule, value_at


@register(
    "clip",
    formula="g = g * min(1, limit / |g|), |g|^p = sum over all tensors of |g_i|^p, p = 2 unless given",
    source="Pascanu, Mikolov and Bengio 2013, On the difficulty of training RNNs, algorithm 1",
)
@dataclass(frozen=True, slots=True)
class ByGlobalNorm(Stateless):
    """Scale all tensors by one factor so that their joint norm is at most the limit.

    ``g = g * min(1, limit / n)`` with ``n = (sum_i |g_i|^p)^(1/p)`` over all entries. The direction stays.

    `limit`: > 0, in units of the joint norm, a number, an array of one number, or a schedule of the attempted
    step; ``inf`` measures only. `norm`: p, from 1 to ``inf`` (the largest magnitude). Raises `InvalidArgument`
    for a limit that is negative, zero or NaN, and for another norm. Stateless.

    >>> import numpy as np, karikomi as kk
    >>> grads, outcome, state = kk.numpy.clip({"a": np.array([3.0]), "b": np.array([4.0])}, ByGlobalNorm(1.0))
    >>> round(float(grads["a"][0]), 3), round(float(grads["b"][0]), 3), outcome.pre
    (0.6, 0.8, 5.0)
    >>> kk.numpy.clip({"a": np.array([3.0, 4.0])}, ByGlobalNorm(1.0, norm=1))[1].pre
    7.0

    Source: Pascanu, Mikolov and Bengio 2013, algorithm 1; ``torch.nn.utils.clip_grad_norm_``. Deviations:
    no 1e-6 in the denominator, and at or below the limit nothing is multiplied.
    """

    limit: float | Schedule
    _: KW_ONLY
    norm: float = 2.0

    scope = Scope.GLOBAL
    of = Quantity.GRADIENT

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="ByGlobalNorm"))
        object.__setattr__(self, "norm", check_order(self.norm, where="ByGlobalNorm"))

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
        """Return one factor, shape (1,)."""
        limit = value_at(self.limit, facts["step"], xp=xp)
        return Decision(shrink_to(norms, limit, xp=xp), None, leave(xp)), state
