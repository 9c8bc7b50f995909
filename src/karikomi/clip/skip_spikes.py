"""Skip-step: a step whose norm is far outside of what the last ones were is not taken at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.clip import history
from karikomi.clip.arguments import check_count
from karikomi.registry import register
from karikomi.rule import Array, Decision, Namespace, Quantity, Scope, State, check_limit
from karikomi.schedule import Schedule, value_at


@register(
    "clip",
    formula="take no step if |g| > mean + sigma * sd of the last `window` global norms",
    source="Ai2 2024, OLMo-core (its code, SkipStepOptimizer)",
)
@dataclass(frozen=True, slots=True)
class SkipSpikes:
    """Take no step when the global norm is an outlier among those of the last accepted steps.

    Skip if ``n > mean + sigma * sd``, mean and standard deviation (with ``count - 1``) being those of the
    last `window` accepted norms, this one not among them. Nothing is scaled.

    `sigma`: > 0, in standard deviations, or a schedule of the attempted step; ``inf`` measures only.
    `window`: >= 2, accepted steps. `warmup`: from 2 to `window`; with fewer norms known no step is skipped.
    `patience`: >= 1; after so many skipped steps in a row the next finite one is taken; steps that are not
    finite neither count nor end the row. Raises `InvalidArgument` for other numbers.

    Learns from raw norms of accepted steps, there being no others. A skipped step teaches nothing, so
    without `patience` a lasting change of scale would be skipped for ever; with it the norms of the new
    scale enter one by one, until they are usual. Norms of exactly zero teach nothing.

    >>> import numpy as np, karikomi as kk
    >>> rule, state = SkipSpikes(3.0, warmup=4), None
    >>> for size in (1.0, 1.2, 1.1, 0.9, 5.0, 1.0):
    ...     grads, outcome, state = kk.numpy.clip({"w": np.array([size])}, rule, state)
    ...     print(outcome.action, end=" ")
    kept kept kept kept skipped kept

    Source: ``SkipStepOptimizer`` of OLMo-core. Deviations: it also looks at the loss; a small norm is no
    spike (there also one far below the mean is skipped); skipped norms do not enter (there they do, and
    one NaN skips every step until it has left the window); `patience`.
    """

    sigma: float | Schedule = 6.0
    _: KW_ONLY
    window: int = 128
    warmup: int = 64
    patience: int = 16

    scope = Scope.GLOBAL
    of = Quantity.GRADIENT
    by_design = True
    skips = True
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        window = check_count(self.window, "the window", where="SkipSpikes", low=2)
        checked = {
            "sigma": check_limit(self.sigma, where="SkipSpikes (sigma)"),
            "window": window,
            "warmup": check_count(
                self.warmup, "the warm-up", where="SkipSpikes", low=2, high=window
            ),
            "patience": check_count(self.patience, "the patience", where="SkipSpikes", low=1),
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
        """Return whether to skip; no factor and no limit."""
        sigma = value_at(self.sigma, facts["step"], xp=xp)
        limit = _limit(state, sigma, xp=xp)
        judged = (state["seen"] >= self.warmup) & (facts["skipped_in_a_row"] < self.patience)
        skip = xp.any(norms > limit) & judged & (sigma > 0) & xp.isfinite(sigma)
        taught = history.teaches(norms, present, xp=xp)
        return Decision(None, None, skip), history.append(state, norms, taught, xp=xp)


def _limit(state: State, sigma: Array, *, xp: Namespace) -> Array:
    """Return ``mean + sigma * sd`` of the ring, in units of its largest norm against overflow."""
    ring, seen = state["ring"], state["seen"]
    largest = xp.max(ring)
    known = history.known(state, xp=xp)
    # Seen from the largest, equal norms have a mean and a spread of exactly zero.
    apart = ring / xp.where(largest > 0, largest, xp.ones_like(largest)) - 1.0
    apart = xp.where(known, apart, xp.zeros_like(apart))
    mean = xp.sum(apart) / xp.where(seen > 0, seen, xp.ones_like(seen))
    rest = xp.where(known, xp.square(apart - mean), xp.zeros_like(apart))
    sd = xp.sqrt(xp.sum(rest) / xp.where(seen > 1, seen - 1, xp.ones_like(seen)))
    band = xp.where(xp.isfinite(sigma), sigma, xp.zeros_like(sigma)) * sd
    return largest * (1.0 + mean + band)
