"""SPAM: entries far above their own running root mean square are clamped to a multiple of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.clip.arguments import check_count
from karikomi.registry import register
from karikomi.rule import Array, Decision, Namespace, Quantity, Scope, State, check_limit, leave
from karikomi.schedule import Schedule, value_at


@register(
    "clip",
    formula="g = sign(g) * min(|g|, sqrt(threshold * v)), v: running mean of g^2, entry by entry",
    source="Huang et al. 2025, SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training",
)
@dataclass(frozen=True, slots=True)
class SPAM:
    """Clamp every gradient entry whose square exceeds `threshold` times its running mean square.

    ``g = sign(g) * min(|g|, sqrt(threshold * v))`` with v before this step, not bias-corrected. What is
    measured of a tensor is its largest ``|g| / sqrt(v)``; the answer is the limit ``sqrt(threshold)``.

    `threshold`: > 0, without unit, or a schedule of the attempted step; ``inf`` measures only. `warmup`:
    >= 0; a tensor's first ``warmup - 1`` accepted steps are left alone, while v is too young to judge by.
    Raises `InvalidArgument` for other numbers.

    Learns from clipped entries: v is the running mean of what the optimizer gets, as Adam's is.

    >>> import numpy as np
    >>> rule = SPAM(400.0, warmup=1)
    >>> largest = np.array([3.0, 25.0])
    >>> answer, _ = rule.decide(largest, rule.init(largest, xp=np), present=np.array([True, True]),
    ...                         facts={"step": np.array(0.0)}, xp=np)
    >>> answer.limit.tolist()
    [20.0, 20.0]

    Source: Huang et al. 2025, with its defaults; ``TianjinYellow/SPAM-Optimizer``. Deviations: momentum reset and its
    warm-up belong to an optimizer and are not here; the warm-up is counted per tensor; an entry whose v
    is zero is left alone (there it is set to zero, so that an entry whose first gradient comes
    after the warm-up can never learn).
    """

    threshold: float | Schedule = 5000.0
    _: KW_ONLY
    warmup: int = 20

    scope = Scope.ELEMENT
    of = Quantity.GRADIENT
    needs = frozenset({"second_moment"})

    def __post_init__(self) -> None:
        threshold = check_limit(self.threshold, where="SPAM (threshold)")
        object.__setattr__(self, "threshold", threshold)
        warmup = check_count(self.warmup, "the warm-up", where="SPAM", low=0)
        object.__setattr__(self, "warmup", warmup)

    def init(self, like: Array, *, xp: Namespace) -> State:
        """Return how many steps of the warm-up were ``seen``, per tensor."""
        return {"seen": xp.zeros_like(like)}

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return one limit per tensor, in units of sqrt(v)."""
        ones, seen = xp.ones_like(norms), state["seen"]
        warm = seen + 1 >= self.warmup
        limit = xp.sqrt(value_at(self.threshold, facts["step"], xp=xp))
        after = {"seen": xp.where(present & ~warm, seen + 1, seen)}
        return Decision(None, xp.where(warm, limit * ones, math.inf * ones), leave(xp)), after
