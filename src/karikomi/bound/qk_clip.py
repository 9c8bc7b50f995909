"""QK-clip: no attention head's largest logit stays above the limit."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

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
    check_limit,
    leave,
    shrink_to,
)
from karikomi.schedule import Schedule, value_at


@register(
    "bound",
    formula="W_q,h *= gamma^alpha, W_k,h *= gamma^(1 - alpha) with gamma = min(1, limit / S_h)",
    source="Kimi Team 2025, Kimi K2, arXiv 2507.20534, section 2.1 (QK-Clip of MuonClip)",
)
@dataclass(frozen=True, slots=True)
class QKClip(Stateless):
    """Scale down the query and key projections of every head whose largest logit is above the limit.

    ``gamma_h = min(1, limit / S_h)``, ``W_q,h = W_q,h * gamma_h^alpha``, ``W_k,h = W_k,h *
    gamma_h^(1 - alpha)``, biases alike, S_h being the largest logit ``q k / sqrt(d)`` of head h in the
    forward passes since the last step. Each head's logits are then multiplied by its own gamma_h and
    by nothing else. A key head that several query heads share is left alone, and its query heads take
    the whole of gamma_h: no head pays for another.

    `limit`: > 0, in units of a logit, or a schedule; ``inf`` measures only. `alpha`: in [0, 1], the
    query's part of the exponent. S_h must be supplied, it cannot be read from weights; without it the
    framework folder refuses. Raises `InvalidArgument` for a limit that is negative, zero or NaN, and
    for an alpha outside its range. Stateless. The share at the bound is that of the heads.

    >>> import numpy as np, karikomi as kk
    >>> weights = {"wq": np.ones((4, 2)), "wk": np.ones((4, 2))}
    >>> bounded, outcome, state = kk.numpy.bound(
    ...     weights, QKClip(100.0), logits={"attn": [400.0, 7.0]}, attention={"attn": ("wq", "wk")})
    >>> bounded["wq"][:, 0].tolist(), bounded["wk"][:, 0].tolist(), outcome.post
    ([0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 1.0, 1.0], 100.0)

    Source: Kimi Team 2025, algorithm 1. The paper leaves its shared rotary key alone and scales the
    rotary query by gamma_h; we treat every shared key so. Deviation from Megatron-LM, which clips all
    query heads of a group by the largest logit of the group.
    """

    limit: float | Schedule = 100.0
    _: KW_ONLY
    alpha: float = 0.5

    scope = Scope.UNIT
    of = Quantity.WEIGHT
    needs = frozenset({"largest_logit"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="QKClip"))
        alpha = self.alpha
        number = isinstance(alpha, numbers.Real) and not isinstance(alpha, bool)
        if not number or math.isnan(alpha) or not 0.0 <= alpha <= 1.0:
            raise InvalidArgument(
                "alpha is a share", where="QKClip", got=repr(alpha), allowed="0 to 1"
            )
        object.__setattr__(self, "alpha", float(alpha))

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return gamma for every head; `norms` are largest logits."""
        limit = value_at(self.limit, facts["step"], xp=xp)
        return Decision(shrink_to(norms, limit, xp=xp), None, leave(xp)), state

    def split(self, gamma: Array, *, shared: bool) -> tuple[Array, Array]:
        """Return the factors of the query and of the key heads, one per number of gamma.

        `shared`: whether several query heads share a key head.
        """
        alpha = 1.0 if shared else self.alpha
        return gamma**alpha, gamma ** (1.0 - alpha)
