"""Quantile clipping: the limit is a quantile of the last norms, so that it follows the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.clip import history
from karikomi.clip.arguments import check_count, check_number
from karikomi.registry import register
from karikomi.rule import Array, Decision, Namespace, Quantity, Scope, State, leave, shrink_to


@register(
    "clip",
    formula="g = g * min(1, limit / |g|), limit = quantile of the last `window` global norms before this one",
    source="Merad and Gaiffas 2023, Robust Stochastic Optimization via Gradient Quantile Clipping",
)
@dataclass(frozen=True, slots=True)
class Quantile:
    """Clip by global norm at a quantile of the last norms, the present one not among them.

    ``limit_t = quantile_q(n_(t-window), ..., n_(t-1))``, linear between ranks; multiplying the loss by a
    constant changes no decision. For a percentile of all norms so far see `AutoClip`.

    `quantile`: from 0 to 1; at 1 a norm may be as large as the largest of the last ones. `window`: >= 1,
    accepted steps. `warmup`: from 1 to `window`; with fewer norms known nothing is clipped. Raises
    `InvalidArgument` for numbers out of range.

    Learns from raw norms: of clipped ones none would be above the limit, so that it could fall but
    never rise again. Norms of exactly zero teach nothing.

    >>> import numpy as np, karikomi as kk
    >>> rule, state = Quantile(0.5, window=3, warmup=3), None
    >>> for size in (1.0, 2.0, 3.0, 100.0):
    ...     grads, outcome, state = kk.numpy.clip({"w": np.array([size])}, rule, state)
    >>> outcome.pre, round(outcome.post, 6)
    (100.0, 2.0)

    Source: Merad and Gaiffas 2023, rolling quantiles. Choices: the present norm is left out, because
    between ranks a share of a spike would enter its own limit; linear between ranks as
    ``numpy.quantile``; instead of a buffer filled before the first step, a warm-up.
    """

    quantile: float = 0.9
    _: KW_ONLY
    window: int = 100
    warmup: int = 20

    scope = Scope.GLOBAL
    of = Quantity.GRADIENT
    by_design = True
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        window = check_count(self.window, "the window", where="Quantile", low=1)
        checked = {
            "quantile": check_number(
                self.quantile, "the quantile", where="Quantile", low=0.0, high=1.0
            ),
            "window": window,
            "warmup": check_count(self.warmup, "the warm-up", where="Quantile", low=1, high=window),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def init(self, like: Array, *, xp: Namespace) -> State:
        """Return an empty ring of norms."""
        return history.begin(like, self.window, xp=xp)

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
        limit = history.quantile(state, self.quantile, xp=xp)
        limit = xp.where(state["seen"] >= self.warmup, limit, xp.zeros_like(limit))
        taught = history.teaches(norms, present, xp=xp)
        after = history.append(state, norms, taught, xp=xp)
        return Decision(shrink_to(norms, limit, xp=xp), None, leave(xp)), after
