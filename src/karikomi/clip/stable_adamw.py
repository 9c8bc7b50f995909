"""StableAdamW's update clipping: smaller steps where the second moment lags behind the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from karikomi.clip.block_rms import root_mean
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
    formula="u_i = u_i / max(1, RMS(g_i / sqrt(v_i)) / limit) for every tensor i of the update",
    source="Wortsman et al. 2023, Stable and low-precision training for large-scale vision-language models, "
    "algorithm 2",
)
@dataclass(frozen=True, slots=True)
class StableAdamW(Stateless):
    """Scale the update of every tensor whose gradient is large for its own running mean square.

    ``u_i = u_i / max(1, RMS_i / limit)`` with ``RMS_i = sqrt(mean(g_i^2 / v_i))``, v being the running mean of
    squares after this step, bias-corrected: about 1 while v is up to date.

    `limit`: > 0, without unit, or a schedule of the attempted step; ``inf`` measures only. Raises
    `InvalidArgument` for a limit that is negative, zero or NaN. No state beside v, which the framework's
    side keeps. Acts on updates: only where the step is ours to see.

    >>> import numpy as np
    >>> facts = {"step": np.array(0.0), "sizes": np.array([4.0, 4.0])}
    >>> answer, _ = StableAdamW().decide(
    ...     np.array([8.0, 1.0]), {}, present=np.array([True, True]), facts=facts, xp=np)
    >>> answer.factor.tolist()
    [0.25, 1.0]

    Source: Wortsman et al. 2023, algorithm 2. Deviations: an entry whose v is zero counts as 0, there v is at least
    eps^2; what is scaled is the optimizer's whole step, as there with its learning rate.
    """

    limit: float | Schedule = 1.0

    scope = Scope.TENSOR
    of = Quantity.UPDATE
    needs = frozenset({"sizes", "second_moment"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="StableAdamW"))

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
        rms = root_mean(norms, facts["sizes"], xp=xp)
        return Decision(shrink_to(rms, limit, xp=xp), None, leave(xp)), state
