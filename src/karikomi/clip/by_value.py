"""Clip by value: every entry is clamped on its own."""

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
)
from karikomi.schedule import Schedule, value_at


@register(
    "clip",
    formula="g = clamp(g, -limit, limit), entry by entry",
    source="Mikolov 2012, Statistical Language Models Based on Neural Networks (thesis), 3.3",
)
@dataclass(frozen=True, slots=True)
class ByValue(Stateless):
    """Clamp every entry of every gradient to ``[-limit, limit]``.

    ``g = min(max(g, -limit), limit)``. The direction of the gradient changes.

    `limit`: > 0, in units of one gradient entry, or a schedule of the attempted step; ``inf``
    measures only. Raises `InvalidArgument` for a limit that is negative, zero or NaN. Stateless.

    >>> import numpy as np, karikomi as kk
    >>> grads, outcome, state = kk.numpy.clip({"w": np.array([3.0, -0.5])}, ByValue(1.0))
    >>> grads["w"].tolist()
    [1.0, -0.5]

    Source: Mikolov 2012 (thesis), section 3.3, there with limit 15. No deviation. The same as
    ``torch.nn.utils.clip_grad_value_`` and ``tf.clip_by_value``.
    """

    limit: float | Schedule

    scope = Scope.ELEMENT
    of = Quantity.GRADIENT

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="ByValue"))

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return the limit, the same for every tensor; `norms` are largest magnitudes."""
        limit = value_at(self.limit, facts["step"], xp=xp)
        return Decision(None, limit * xp.ones_like(norms), leave(xp)), state
