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

_FOUND = ("limit", "median", "spread", "tail")
_Q95 = 1.644853626951
REACH = 2.25
"""In medians: where one norm in twenty is larger than so many, large norms may be frequent."""

MOVED, SOME = 3.0, 8
"""The estimate is renewed early where the median of at least `SOME` later norms differs `MOVED`-fold from it."""

RISING = 4
"""So many norms in a row, from the limit to `MOVED` times it, are no outliers: limit and median rise `MOVED`-fold."""

STAYS = 1.6
"""In medians: large norms that were frequent stay so while one in twenty is larger than so many."""

_LEAST_SPREAD = 0.01
"""Log norms that vary less are within one bin of the histogram."""

_COUNTED = ("counts", "first", "smallest", "largest")
QUARTILES = (
    2.0 * 0.674489750196
)  # the distance between the quartiles of a normal distribution, in sd


@register(
    "clip",
    formula="g = g * min(1, limit / |g|), limit = median * e^(sigma * sd), from `least` to `most` medians, or `heavy` "
    "medians where large norms are frequent; median, sd: of log |g| in the last half of the steps, robust; while it "
    "warms up `early` medians of all norms so far",
    source="Pascanu, Mikolov and Bengio 2013, On the difficulty of training RNNs (the range of limits)",
)
@dataclass(frozen=True, slots=True)
class Recommended:
    """Clip by global norm at a limit that is estimated from the run: far above usual norms, below explosions.

    ``log limit = m + clamp(sigma * s, log least, log most)`` with ``m`` the median and ``s`` the robust standard
    deviation, ``(q75 - q25) / 1.349``, of the logarithms of the global norms; but ``limit = heavy * median`` where
    large norms are frequent, ``q95 - m > max(tail * 1.645 s, log 2.25)``: then there is no gap between usual norms and
    those to hold, and every step is made of about the same length; once so, this stays while
    ``q95 - m > max(1.645 s, log 1.6)``, since few norms show few large ones. Estimated after `warmup` accepted steps,
    then again each time their number has doubled, at the latest every `every` steps, from the norms since the
    estimate before; and at once where the median of 8 or more norms since then has become a third or three times of
    that of the estimate: so the limit follows norms that fall, and does not hold a run whose usual norm rises, as
    after a plateau. Until the first estimate the limit is `early` medians of the norms before this one, from the
    second norm on: a few short steps cost little, whereas an outlier would stay in the weights and, under Adam, in
    the second moments. Multiplying the loss by a constant changes no decision.

    `sigma`: > 0, in standard deviations of log norms. `least`, `most`: >= 1, in medians, ``least <= most``. `tail`:
    >= 1, 1 being a normal distribution; with infinity large norms are never frequent. `heavy`: > 0, in medians.
    `warmup`: >= 2 accepted steps. `early`: > 0, in medians; with infinity nothing is clipped in the warm-up. `every`:
    >= `warmup`. Raises `InvalidArgument` for numbers out of range. `explain` says what was picked, when and why.

    Learns from raw norms: of clipped ones the limit could fall but never rise. Norms of exactly zero
    teach nothing. Norms are counted in bins of 2.2 %, so the limit is off by at most that.

    >>> import numpy as np, karikomi as kk
    >>> rule, state = Recommended(warmup=4), None
    >>> for size in (1.0, 1.1, 0.9, 1.0, 50.0):
    ...     grads, outcome, state = kk.numpy.clip({"w": np.array([size])}, rule, state)
    >>> round(outcome.post, 1)
    3.0
    >>> print(rule.explain(state).partition(": ")[0])
    limit 3 = 3 x the median norm 1, as estimated after 4 norms

    Source: Pascanu, Mikolov and Bengio 2013, section 3.2: limits from half to ten times the average norm
    converge. Choices: the upper part of this range, where a clip only acts on outliers, and its lower end where
    outliers are frequent (more than about one step in twenty), by what `benchmarks/closed_loop.py` measured; medians,
    which explosions do not move.
    """

    sigma: float = 3.0
    _: KW_ONLY
    least: float = 3.0
    most: float = 10.0
    tail: float = 1.3
    heavy: float = 0.7
    early: float = 1.0
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
            "tail": math.inf
            if self.tail == math.inf
            else check_number(self.tail, "tail", where=where, low=1.0),
            "heavy": check_number(self.heavy, "heavy", where=where, low=0.0, open_low=True),
            "early": math.inf
            if self.early == math.inf
            else check_number(self.early, "early", where=where, low=0.0, open_low=True),
            "warmup": warmup,
            "every": check_count(self.every, "every", where=where, low=warmup),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def init(self, like: Array, *, xp: Namespace) -> State:
        """Return an empty histogram, no limit, and the number of norms after which there is one."""
        nothing = xp.sum(xp.zeros_like(like))
        known = dict.fromkeys((*_FOUND, "seen"), nothing)
        more = {"due": nothing + self.warmup, "at": nothing, "row": nothing, "rises": nothing}
        return {**histogram.begin(like, xp=xp), **known, **more}

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
        taught = history.teaches(norms, present, xp=xp)
        counted = {key: state[key] for key in _COUNTED}
        norm = xp.max(norms)
        counted = histogram.count(counted, norm, taught, xp=xp)
        seen = xp.where(taught, state["seen"] + 1, state["seen"])
        median, spread, tail = typical(counted, xp=xp)
        known = state["limit"] > 0
        moved = known & _moved(median, state["median"], xp.sum(counted["counts"]))
        renewed = taught & ((seen >= state["due"]) | moved)
        frequent = known & self._below(state["limit"], state["median"])
        limit = self.limit_of(median, spread, tail, frequent=frequent, xp=xp)
        later = seen + xp.minimum(seen, self.every * xp.ones_like(seen))
        in_row = xp.where(_above(norm, state, xp=xp), state["row"] + 1, xp.zeros_like(seen))
        in_row = xp.where(taught & known, in_row, state["row"])
        rises = ~renewed & (in_row >= RISING)
        anew, zero = renewed | rises, xp.zeros_like(seen)
        factor = xp.where(rises, MOVED * xp.ones_like(median), xp.ones_like(median))
        return Decision(shrink_to(norms, self._now(state, xp=xp), xp=xp), None, leave(xp)), {
            **{k: xp.where(anew, xp.zeros_like(v), v) for k, v in counted.items()},
            "limit": xp.where(renewed, limit, factor * state["limit"]),
            "spread": xp.where(renewed, spread, state["spread"]),
            "tail": xp.where(renewed, tail, state["tail"]),
            "median": xp.where(renewed | ~known, median, factor * state["median"]),
            "seen": seen,
            "at": xp.where(renewed, seen, state["at"]),
            "due": xp.where(renewed, later, xp.where(rises, seen + self.warmup, state["due"])),
            "row": xp.where(anew, zero, in_row),
            "rises": xp.where(renewed, zero, xp.where(rises, state["rises"] + 1, state["rises"])),
        }

    def _now(self, state: State, *, xp: Namespace) -> Array:
        """Return the limit of this step; 0 for none."""
        limit = state["limit"]
        if self.early == math.inf:
            return limit
        return xp.where(limit > 0, limit, self.early * state["median"])

    def limit_of(
        self,
        median: Array,
        spread: Array,
        tail: Array,
        *,
        frequent: Array | None = None,
        xp: Namespace,
    ) -> Array:
        """Return the limit for a median norm, spread and tail of log norms, 0-d arrays; 0 for a median of 0.

        `frequent`: whether large norms were frequent at the estimate before.
        """
        ones = xp.ones_like(median)
        # In units of the median; clamped before `exp`, which a large spread would overflow.
        low, high = math.log(self.least) * ones, math.log(self.most) * ones
        above = xp.exp(xp.minimum(xp.maximum(self.sigma * spread, low), high))
        if self.tail == math.inf:
            return median * above
        large = (tail > self.tail) & (tail * spread > math.log(REACH) / _Q95)
        if frequent is not None:
            large = large | (frequent & (tail > 1.0) & (tail * spread > math.log(STAYS) / _Q95))
        return median * xp.where(large, self.heavy * ones, above)

    def _below(self, limit: Any, median: Any) -> Any:
        """Return whether a limit is below the least one of norms without frequent large ones."""
        return limit < 0.99 * self.least * median

    def explain(self, state: Mapping[str, Any] | None) -> str:
        """Return what was picked and why, from a state: of `clip_`, or ``handle.state_dict()["clip"]``.

        Raises `InvalidArgument` for the state of another rule.
        """
        found = {} if state is None else {str(k).removeprefix("rule."): v for k, v in state.items()}
        if found and not {*_FOUND, "seen"} <= found.keys():
            raise InvalidArgument("not a state of this rule", where="Recommended.explain")
        limit, median, spread, tail = (float(found.get(k, 0)) for k in _FOUND)
        seen, at, rises = (int(float(found.get(k, 0))) for k in ("seen", "at", "rises"))
        if limit == 0.0:
            so_far = f"{seen} of {self.warmup} norms of the warm-up are known"
            if seen == 0 or self.early == math.inf:
                return f"no limit yet: {so_far}"
            now = f"limit {self.early * median:.3g} = {self.early:.3g} x their median {median:.3g}"
            return f"{so_far}: until the estimate {now}"
        since = f" and raised {MOVED**rises:g}-fold since" if rises else ""
        when = f", as estimated after {at} norms{since}"
        return self.reason(limit, median, spread, tail, at=when)

    def reason(
        self, limit: float, median: float, spread: float, tail: float, *, at: str = ""
    ) -> str:
        """Return one line that derives a limit from the median, the spread and the tail; `at`: when."""
        head = f"limit {limit:.3g} = {limit / median:.3g} x the median norm {median:.3g}{at}"
        if self._below(limit, median) or (
            tail > self.tail and tail * spread > math.log(REACH) / _Q95
        ):
            reach = math.exp(min(tail * _Q95 * spread, 700.0))
            return (
                f"{head}: large norms are frequent (one in twenty is above {reach:.3g} x the median, {tail:.2g} times "
                f"as far as their spread lets expect), so the limit is below the median"
            )
        wanted = self.sigma * spread
        ratio = f"{math.exp(wanted):.3g} x" if wanted < 20.0 else f"e^{wanted:.3g} x"
        why = f"{self.sigma:g} sd of log norms ({spread:.3g}) are {ratio}"
        if wanted < math.log(self.least):
            why += f", below the least, {self.least:g} x"
        elif wanted > math.log(self.most):
            why += f", above the most, {self.most:g} x"
        return f"{head}: {why}"


def _above(norm: Array, state: State, *, xp: Namespace) -> Array:
    """Return whether a norm is large and no explosion: above limit and `MOVED` medians, up to `MOVED` times that."""
    base = xp.maximum(state["limit"], MOVED * state["median"])
    return (norm > base) & (norm <= MOVED * base)


def _moved(median: Array, before: Array, count: Array) -> Array:
    """Return whether the usual norm is another one than at the estimate, a 0-d bool."""
    return (count >= SOME) & ((median > MOVED * before) | (MOVED * median < before))


def typical(counted: State, *, xp: Namespace) -> tuple[Array, Array, Array]:
    """Return the median norm, and of log norms the robust standard deviation and the tail, 0-d arrays.

    The tail is the distance from the median to the 95th percentile over that of a normal distribution of this standard
    deviation; 1 where they do not vary.
    """
    low, median, high, top = histogram.quantiles(counted, (0.25, 0.5, 0.75, 0.95), xp=xp)
    ones = xp.ones_like(median)
    usable = (low > 0) & (high > 0)
    # The quotients could overflow where their logarithms do not.
    logs = [xp.log(xp.where(usable, value, ones)) for value in (low, median, high, top)]
    spread = (logs[2] - logs[0]) / QUARTILES
    varies = spread > _LEAST_SPREAD
    tail = (logs[3] - logs[1]) / xp.where(varies, _Q95 * spread, ones)
    return median, spread, xp.where(varies, tail, ones)
