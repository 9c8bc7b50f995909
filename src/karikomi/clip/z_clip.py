"""ZClip: a norm many standard deviations above its running mean is pulled back towards the mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.clip.arguments import (
    check_choice,
    check_count,
    check_decay,
    check_flag,
    check_number,
)
from karikomi.clip.running import root_mean_square
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
from karikomi.schedule import Schedule, value_at


@register(
    "clip",
    formula="if (|g| - mean) / sd > z: limit = mean + (z * sd)^2 / (|g| - mean); mean, sd: running",
    source="Kumar, Owen, Chowdhury and Guera 2025, ZClip: Adaptive Spike Mitigation for LLM Pre-Training",
)
@dataclass(frozen=True, slots=True)
class ZClip:
    """Clip by global norm when the norm is an outlier of its own recent past, the harder the larger it is.

    With ``d = n - mean``: if ``d > z * sd`` the norm becomes ``clip_factor * (mean + (z * sd)^2 / d)``. Then
    ``mean = alpha * mean + (1 - alpha) * n`` and ``sd^2 = alpha * sd^2 + (1 - alpha) * (n - mean)^2`` with
    the norm after clipping and the new mean. They start as mean and standard deviation of the first
    `warmup` norms, of which none is clipped.

    `z`: > 0, in standard deviations, or a schedule of the attempted step; ``inf`` measures only. `alpha`:
    from 0 to below 1. `warmup`: >= 1, accepted steps. `clip_factor`: above 0, up to 1; smaller is harder. `to`:
    where a spike is pulled back to, ``"adaptive"`` as above, ``"threshold"`` to ``mean + z * sd`` (mode
    ``percentile`` of the published code), ``"mean"`` to the mean (its ``clip_option="mean"``); without `clip_factor`.
    `skip_update_on_spike`: whether a spike teaches nothing at all. Raises `InvalidArgument` for other values.

    Learns from clipped norms: with raw ones a single spike would widen mean and deviation so far that
    the next ones pass (in the warm-up there is no limit, and norms are taken raw). Norms of exactly
    zero teach nothing. With a small `z` or `clip_factor` on norms that vary much, most steps are
    clipped and mean and deviation run down together: watch the share of clipped steps.

    There is no fixed limit inside: ``Chain(ZClip(), ByGlobalNorm(1.0))`` is what the published code does by
    default (``max_grad_norm=1.0``), and never exceeds 1.

    >>> import numpy as np, karikomi as kk
    >>> rule, state = ZClip(2.0, warmup=4), None
    >>> for size in (1.0, 2.0, 1.0, 2.0, 2.0, 11.5):
    ...     grads, outcome, state = kk.numpy.clip({"w": np.array([size])}, rule, state)
    >>> round(outcome.pre, 3), round(outcome.post, 3)
    (11.5, 1.615)

    Source: Kumar et al. 2025; ``bluorion-com/ZClip``, mode ``zscore`` with ``adaptive_scaling``. Deviations: no
    1e-6 beside the deviation (which makes decisions depend on the scale of the loss), norms of zero,
    and non-finite norms never enter (there one NaN disables clipping for good).
    """

    z: float | Schedule = 2.5
    _: KW_ONLY
    alpha: float = 0.97
    warmup: int = 25
    clip_factor: float = 1.0
    to: str = "adaptive"
    skip_update_on_spike: bool = False

    scope = Scope.GLOBAL
    of = Quantity.GRADIENT
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        checked = {
            "z": check_limit(self.z, where="ZClip"),
            "alpha": check_decay(self.alpha, "alpha", where="ZClip"),
            "warmup": check_count(self.warmup, "the warm-up", where="ZClip", low=1),
            "clip_factor": check_number(
                self.clip_factor, "clip_factor", where="ZClip", low=0.0, high=1.0, open_low=True
            ),
        }
        check_choice(self.to, "to", ("adaptive", "threshold", "mean"), where="ZClip")
        check_flag(self.skip_update_on_spike, "skip_update_on_spike", where="ZClip")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def init(self, like: Array, *, xp: Namespace) -> State:
        """Return ``mean``, ``sd`` and how many norms of the warm-up were ``seen``."""
        return dict.fromkeys(("mean", "sd", "seen"), xp.zeros_like(like))

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
        z = value_at(self.z, facts["step"], xp=xp)
        warm = state["seen"] >= self.warmup
        spike, limit = self._limit(norms, state, z, warm, xp=xp)
        factor = shrink_to(norms, limit, xp=xp)
        after = self._learned(xp.minimum(norms, limit), state, warm, xp=xp)
        taught = present & (norms > 0)
        taught = taught & ~spike if self.skip_update_on_spike else taught
        after = {key: xp.where(taught, value, state[key]) for key, value in after.items()}
        return Decision(factor, None, leave(xp)), after

    def _limit(
        self, norms: Array, state: State, z: Array, warm: Array, *, xp: Namespace
    ) -> tuple[Array, Array]:
        """Return whether the norm is a spike, and the norm that it may have."""
        usable = (z > 0) & xp.isfinite(z)
        band = xp.where(usable, z, xp.zeros_like(z)) * state["sd"]
        above = norms - state["mean"]
        spike = warm & usable & (above > band)
        share = band / xp.where(spike, above, xp.ones_like(above))
        adaptive = state["mean"] + band * xp.where(spike, share, xp.zeros_like(share))
        limits = {
            "adaptive": self.clip_factor * adaptive,
            "threshold": state["mean"] + band,
            "mean": state["mean"],
        }
        return spike, xp.where(spike, limits[self.to], norms)

    def _learned(self, norms: Array, state: State, warm: Array, *, xp: Namespace) -> State:
        mean, sd, seen = state["mean"], state["sd"], state["seen"]
        count = seen + 1
        rest = seen / count
        first = {
            "mean": mean + (norms - mean) / count,
            "sd": root_mean_square(sd, rest, norms - mean, rest / count, xp=xp),
            "seen": count,
        }
        moved = self.alpha * mean + (1.0 - self.alpha) * norms
        later = {
            "mean": moved,
            "sd": root_mean_square(sd, self.alpha, norms - moved, 1.0 - self.alpha, xp=xp),
            "seen": seen,
        }
        return {key: xp.where(warm, later[key], first[key]) for key in first}
