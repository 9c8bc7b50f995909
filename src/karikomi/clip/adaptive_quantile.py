"""Adaptive quantile clipping: the limit moves geometrically until a given share of norms is below it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.clip.arguments import check_number
from karikomi.errors import InvalidArgument
from karikomi.registry import register
from karikomi.rule import (
    Array,
    Decision,
    Namespace,
    Quantity,
    Scope,
    State,
    check_limit,
    leave,
    shrink_to,
)


@register(
    "clip",
    formula="g = g * min(1, C / |g|), then C = C * exp(-rate * (share of norms <= C - quantile))",
    source="Andrew, Thakkar, McMahan and Ramaswamy 2019, Differentially Private Learning with Adaptive Clipping",
)
@dataclass(frozen=True, slots=True)
class AdaptiveQuantile:
    """Clip by norm at a limit that follows a quantile of the norms, without keeping any of them.

    ``g = g * min(1, C / n)``, then ``C = C * exp(-rate * (b - quantile))`` with b the share of the norms of this step
    that are at most C. In `clip_examples` these are the norms of the examples of a batch, as in the paper; as a rule
    of `attach` or `clip` there is one joint norm a step, and b is 0 or 1.

    `start`: > 0, where C begins; ``inf`` measures only. `quantile`: from 0 to 1, the share that is to stay below.
    `rate`: > 0, per step. `least`, `most`: C stays between them. Raises `InvalidArgument` for other numbers. Zero
    and non-finite norms count neither way.

    For differential privacy the count of b needs noise too; noise and accounting are no part of this package, but
    of Opacus and the like.

    >>> import numpy as np, karikomi as kk
    >>> rule, state = AdaptiveQuantile(1.0, quantile=0.5, rate=0.7), None
    >>> grads = {"w": np.array([[0.5], [4.0], [8.0], [16.0]])}
    >>> mean, norms, state = kk.numpy.clip_examples(grads, rule, state)
    >>> float(mean["w"][0]), norms.tolist(), round(state["rule.bound"][0], 3)
    (0.875, [0.5, 4.0, 8.0, 16.0], 1.191)

    Source: Andrew et al. 2019, algorithm 1 without its noise; as Opacus' ``AdaClipDPOptimizer``. Deviation: no 1e-6
    in the denominator.
    """

    start: float = 1.0
    _: KW_ONLY
    quantile: float = 0.5
    rate: float = 0.2
    least: float = 1e-8
    most: float = math.inf

    scope = Scope.GLOBAL
    of = Quantity.GRADIENT
    by_design = True
    of_examples = True
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        where = "AdaptiveQuantile"
        start = check_limit(self.start, where=where)
        if callable(getattr(start, "value", None)):
            raise InvalidArgument(
                "the limit that it begins with is a number", where=where, got=start
            )
        most = (
            self.most
            if self.most == math.inf
            else check_number(self.most, "most", where=where, low=0.0, open_low=True)
        )
        checked = {
            "start": start,
            "quantile": check_number(self.quantile, "the quantile", where=where, low=0.0, high=1.0),
            "rate": check_number(self.rate, "the rate", where=where, low=0.0, open_low=True),
            "least": check_number(self.least, "least", where=where, low=0.0, open_low=True),
            "most": most,
        }
        if checked["least"] > most:
            raise InvalidArgument(
                "least is above most", where=where, got=f"{self.least} and {most}"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def init(self, like: Array, *, xp: Namespace) -> State:
        """Return the limit that it begins with."""
        return {"bound": xp.ones_like(like) * float(self.start)}

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return one factor per norm."""
        bound = state["bound"]
        ones, zeros = xp.ones_like(norms), xp.zeros_like(norms)
        counted = present & (norms > 0)
        count = xp.sum(xp.where(counted, ones, zeros))
        below = xp.sum(xp.where(counted & (norms <= bound), ones, zeros))
        share = below / xp.maximum(count, xp.ones_like(count))
        moved = bound * xp.exp(-self.rate * (share - self.quantile))
        moved = xp.maximum(moved, self.least * xp.ones_like(moved))
        moved = xp.minimum(moved, self.most * xp.ones_like(moved))
        after = {"bound": xp.where((count > 0) & xp.isfinite(bound), moved, bound)}
        return Decision(shrink_to(norms, bound, xp=xp), None, leave(xp)), after
