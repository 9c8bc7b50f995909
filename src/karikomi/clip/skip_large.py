"""Skip by a fixed limit: a step whose norm is above it is not taken at all."""

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
)
from karikomi.schedule import Schedule, value_at


@register(
    "clip",
    formula="take no step if |g| > limit, |g|: the joint p-norm, p = 2 unless given",
    source="optax (its code, skip_large_updates); Megatron-LM (its code, grad_norm_skip_threshold)",
)
@dataclass(frozen=True, slots=True)
class SkipLarge(Stateless):
    """Take no step when the global norm is above a fixed limit. Nothing is scaled.

    Skip if ``n > limit`` with ``n = (sum_i |g_i|^p)^(1/p)`` over all entries. A limit below the usual norms skips
    every step, and the training stands still: `SkipSpikes` follows them.

    `limit`: > 0, in units of the joint norm, a number, an array of one number, or a schedule of the attempted
    step; ``inf`` measures only. `norm`: p, from 1 to ``inf`` (the largest magnitude). Raises `InvalidArgument`
    for a limit that is negative, zero or NaN, and for another norm. Stateless.

    >>> import numpy as np, karikomi as kk
    >>> for size in (1.0, 5.0, 2.0):
    ...     print(kk.numpy.clip({"w": np.array([size])}, SkipLarge(2.0))[1].action, end=" ")
    kept skipped kept

    Source: ``optax.skip_large_updates``, by the square of the norm, and ``grad_norm_skip_threshold`` of Megatron-LM.
    Deviations: a norm that equals the limit is taken (optax skips it); a NaN is skipped by ``nonfinite=`` (Megatron
    takes it).
    """

    limit: float | Schedule
    _: KW_ONLY
    norm: float = 2.0

    scope = Scope.GLOBAL
    of = Quantity.GRADIENT
    by_design = True
    skips = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="SkipLarge"))
        object.__setattr__(self, "norm", check_order(self.norm, where="SkipLarge"))

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
        """Return whether to skip; no factor and no limit."""
        limit = value_at(self.limit, facts["step"], xp=xp)
        return Decision(None, None, xp.any(norms > limit) & (limit > 0)), state
