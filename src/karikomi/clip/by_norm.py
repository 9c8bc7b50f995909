"""Clip by norm: every tensor is scaled on its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    "clip",
    formula="g_i = g_i * min(1, limit / |g_i|) for every tensor i",
    source="Pascanu, Mikolov and Bengio 2013, applied per tensor (as Keras' clipnorm)",
)
@dataclass(frozen=True, slots=True)
class ByNorm(Stateless):
    """Scale every tensor whose own L2 norm exceeds the limit down to it.

    ``g_i = g_i * min(1, limit / |g_i|)`` for each tensor i. The direction within a tensor stays,
    the proportions between tensors change; for one factor for all see `ByGlobalNorm`.

    `limit`: > 0, in units of the norm of one tensor, or a schedule of the attempted step; ``inf``
    measures only. Raises `InvalidArgument` for a limit that is negative, zero or NaN. Stateless.

    >>> import numpy as np, karikomi as kk
    >>> grads, outcome, state = kk.numpy.clip({"a": np.array([3.0, 4.0]), "b": np.ones(1)}, ByNorm(1.0))
    >>> [round(float(x), 3) for x in grads["a"]], grads["b"].tolist()
    ([0.6, 0.8], [1.0])

    Source: Pascanu, Mikolov and Bengio 2013, algorithm 1, on each tensor; ``tf.clip_by_norm``, Keras'
    ``clipnorm``. Deviation: a norm that equals the limit is left bit for bit alone.
    """

    limit: float | Schedule

    scope = Scope.TENSOR
    of = Quantity.GRADIENT

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="ByNorm"))

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return one factor per tensor."""
        limit = value_at(self.limit, facts["step"], xp=xp)
        return Decision(shrink_to(norms, limit, xp=xp), None, leave(xp)), state
