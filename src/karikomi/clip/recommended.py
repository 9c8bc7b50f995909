"""Recommended: a limit from the norms of the run itself, picked as `karikomi.advise` picks it from a record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from karikomi.clip import histogram, history
from karikomi.clip.arguments import check_count, check_number
from karikomi.errors import InvalidArgument
from karikomi.registry import register
from karikomi.rule import Array, Decision, Namespace, Quantity, Scope, State, leave, shrink_to

_COUNTED = ("counts", "first", "smallest", "largest")
QUARTILES = (
    2.0 * 0.674489750196
)  # the distance between the quartiles of a normal distribution, in sd


@register(
    "clip",
    formula="g = g * min(1, limit / |g|), limit = median * e^(sigma * sd), from `least` to `most` medians; "
    "median, sd: of log |g| in the last half of the steps, robust",
    source="Pascanu, Mikolov and Bengio 2013, On the difficulty of training RNNs (the range of limits)",
)
@dataclass(frozen=True, slots=True)
class Recommended:
    """Clip by global norm at a limit that is estimated from the run: far above usual norms, below explosions.

    ``log limit = m + clamp(sigma * s, log least, log most)`` with ``m`` the median and ``s`` the robust standard
    deviation, ``(q75 - q25) / 1.349``, of the logarithms of the global norms. Estimated after `warmup` accepted
    steps, then again each time their number has doubled, at the latest every `every` steps, from
    the norms since the estimate before: so the limit follows norms that fall. Multiplying the loss by a
    constant changes no decision.

    `sigma`: > 0, in standard deviations of log norms. `least`, `most`: >= 1, in medians, ``least <= most``.
    `warmup`: >= 2 accepted steps, in which nothing is clipped: chain it with a fixed limit,
    ``Chain(Recommended(), ByGlobalNorm(cap))``, if the first steps may explode. `every`: >= `warmup`. Raises
    `InvalidArgument` for numbers out of range. `explain` says what was picked and why.

    Learns from raw norms: of clipped ones the limit could fall but never rise. Norms of exactly zero
    teach nothing. Norms are counted in bins of 2.2 %, so the limit is off by at most that.

    >>> import numpy as np, karikomi as kk
    >>> rule, state = Recommended(warmup=4), None
    >>> for size in (1.0, 1.1, 0.9, 1.0, 50.0):
    ...     grads, outcome, state = kk.numpy.clip({"w": np.array([size])}, rule, state)
    >>> round(outcome.post, 1)
    3.0
    >>> print(rule.explain(state))
    limit 3 = 3 x the median norm 1 of the last estimate: 3 sd of log norms (0.0431) are 1.14 x, below the least, 3 x

    Source: Pascanu, Mikolov and Bengio 2013, section 3.2: limits from half to ten times the average norm
    converge. Choices: the upper part of this range, where a clip only acts on outliers; where in it
    is decided by the spread of the run; medians, which explosions do not move.
    """

    sigma: float = 3.0
    _: KW_ONLY
    least: float = 3.0
    most: float = 10.0
    warmup: int = 32
    every: int = 10_000

    scope = Scope.GLOBAL
    of = Quantity.GRADIENT
    by_design = True
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        where = "Recommended"
        least = check_number(self.least, "least", where=where, low=1.0)
        warmup = check_count(self.warmup, "the warm-up", where=where, low=2)
        checked = {
            "sigma": check_number(self.sigma, "sigma", where=where, low=0.0, open_low=True),
            "least": least,
            "most": check_number(self.most, "most", where=where, low=least),
            "warmup": warmup,
            "every": check_count(self.every, "every", where=where, low=warmup),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def init(self, like: Array, *, xp: Namespace) -> State:
        """Return an empty histogram, no limit, and the number of norms after which there is one."""
        nothing = xp.sum(xp.zeros_like(like))
        known = dict.fromkeys(("limit", "median", "spread", "seen"), nothing)
        return {**histogram.begin(like, xp=xp), **known, "due": nothing + self.warmup}

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
        factor = shrink_to(norms, state["limit"], xp=xp)
        taught = history.teaches(norms, present, xp=xp)
        counted = {key: state[key] for key in _COUNTED}
        counted = histogram.count(counted, xp.max(norms), taught, xp=xp)
        seen = xp.where(taught, state["seen"] + 1, state["seen"])
        renewed = taught & (seen >= state["due"])
        median, spread = typical(counted, xp=xp)
        limit = self.limit_of(median, spread, xp=xp)
        found = {"limit": limit, "median": median, "spread": spread}
        due = state["due"]
        later = due + xp.minimum(due, self.every * xp.ones_like(due))
        return Decision(factor, None, leave(xp)), {
            **{k: xp.where(renewed, xp.zeros_like(v), v) for k, v in counted.items()},
            **{key: xp.where(renewed, value, state[key]) for key, value in found.items()},
            "seen": seen,
            "due": xp.where(renewed, later, due),
        }

    def limit_of(self, median: Array, spread: Array, *, xp: Namespace) -> Array:
        """Return the limit for a median norm and a spread of log norms, 0-d arrays; 0 for a median of 0."""
        ones = xp.ones_like(median)
        # In units of the median; clamped before `exp`, which a large spread would overflow.
        low, high = math.log(self.least) * ones, math.log(self.most) * ones
        return median * xp.exp(xp.minimum(xp.maximum(self.sigma * spread, low), high))

    def explain(self, state: Mapping[str, Any] | None) -> str:
        """Return what was picked and why, from a state: of `clip_`, or ``handle.state_dict()["clip"]``.

        Raises `InvalidArgument` for the state of another rule.
        """
        found = {} if state is None else {str(k).removeprefix("rule."): v for k, v in state.items()}
        if found and not {"limit", "median", "spread", "seen"} <= found.keys():
            raise InvalidArgument("not a state of this rule", where="Recommended.explain")
        limit, median, spread = (float(found.get(k, 0)) for k in ("limit", "median", "spread"))
        if limit == 0.0:
            seen = int(float(found.get("seen", 0)))
            return f"no limit yet: {seen} of {self.warmup} norms of the warm-up are known"
        return self.reason(limit, median, spread)

    def reason(self, limit: float, median: float, spread: float) -> str:
        """Return one line that derives a limit from the median and the spread."""
        wanted = self.sigma * spread
        ratio = f"{math.exp(wanted):.3g} x" if wanted < 20.0 else f"e^{wanted:.3g} x"
        why = f"{self.sigma:g} sd of log norms ({spread:.3g}) are {ratio}"
        if wanted < math.log(self.least):
            why += f", below the least, {self.least:g} x"
        elif wanted > math.log(self.most):
            why += f", above the most, {self.most:g} x"
        return (
            f"limit {limit:.3g} = {limit / median:.3g} x the median norm {median:.3g} of the last "
            f"estimate: {why}"
        )


def typical(counted: State, *, xp: Namespace) -> tuple[Array, Array]:
    """Return the median norm and the robust standard deviation of log norms in a histogram, 0-d arrays."""
    low, median, high = (histogram.quantile(counted, q, xp=xp) for q in (0.25, 0.5, 0.75))
    ones = xp.ones_like(median)
    usable = (low > 0) & (high > 0)
    # The quotient of the two could overflow where their logarithms do not.
    logs = [xp.log(xp.where(usable, value, ones)) for value in (high, low)]
    return median, (logs[0] - logs[1]) / QUARTILES
