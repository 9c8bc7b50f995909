"""AutoClip: the limit is a percentile of all norms so far, so that it needs no unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.clip import histogram, history
from karikomi.clip.arguments import check_count, check_number
from karikomi.registry import register
from karikomi.rule import Array, Decision, Namespace, Quantity, Scope, State, leave, shrink_to

_COUNTED = ("counts", "first", "smallest", "largest")


@register(
    "clip",
    formula="g = g * min(1, limit / |g|), limit = percentile of all global norms so far, this one included",
    source="Seetharaman, Wichern, Pardo and Le Roux 2020, AutoClip: Adaptive Gradient Clipping for Source "
    "Separation Networks",
)
@dataclass(frozen=True, slots=True)
class AutoClip:
    """Clip by global norm at a percentile of all norms so far, the present one included.

    ``limit_t = percentile_p(n_1, ..., n_t)``, linear between ranks; multiplying the loss by a constant
    changes no decision. With ``p = 100`` nothing is clipped, with ``p = 0`` the limit is the smallest
    norm ever seen.

    `percentile`: from 0 to 100. `window`: up to how many accepted steps the percentile is exact; from
    then on it is read from a histogram of all of them, and off by at most 2.2 % (a factor 2^(1/32)) as
    long as norms stay within 2^20 of the first one; 0 and 100 stay exact. In float32 a bin stops
    counting at 16.7 million. Raises `InvalidArgument` for numbers out of range.

    Learns from raw norms: of clipped ones at most p percent would be below the limit and all others
    equal to it, so that it could fall but never rise again. Norms of exactly zero teach nothing.

    >>> import numpy as np, karikomi as kk
    >>> rule, state = AutoClip(50), None
    >>> for size in (1.0, 2.0, 9.0):
    ...     grads, outcome, state = kk.numpy.clip({"w": np.array([size])}, rule, state)
    ...     print(round(outcome.post, 6))
    1.0
    1.5
    2.0

    Source: Seetharaman et al. 2020, algorithm 1; ``pseeth/autoclip``, which this equals within the
    window. Deviations: bounded memory, norms of zero, and non-finite norms never enter the history
    (there one NaN makes every later limit NaN).
    """

    percentile: float = 10.0
    _: KW_ONLY
    window: int = 512

    scope = Scope.GLOBAL
    of = Quantity.GRADIENT
    by_design = True
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        percentile = check_number(
            self.percentile, "the percentile", where="AutoClip", low=0.0, high=100.0
        )
        object.__setattr__(self, "percentile", percentile)
        window = check_count(self.window, "the window", where="AutoClip", low=1)
        object.__setattr__(self, "window", window)

    def init(self, like: Array, *, xp: Namespace) -> State:
        """Return an empty history: the first norms themselves, and the histogram of all."""
        return {**history.begin(like, self.window, xp=xp), **histogram.begin(like, xp=xp)}

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
        counted = histogram.count(counted, xp.max(norms), taught, xp=xp)
        kept = history.append(state, norms, taught, xp=xp)
        share = self.percentile / 100.0
        exact = history.quantile(kept, share, xp=xp)
        read = histogram.quantile(counted, share, xp=xp)
        limit = xp.where(xp.sum(counted["counts"]) > self.window, read, exact)
        return Decision(shrink_to(norms, limit, xp=xp), None, leave(xp)), {**kept, **counted}
