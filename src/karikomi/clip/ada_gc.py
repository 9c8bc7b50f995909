"""AdaGC: every tensor in proportion to the running mean of its own clipped norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.clip.arguments import check_count, check_decay, check_ratio
from karikomi.clip.running import ratio_limit
from karikomi.registry import register
from karikomi.rule import (
    Array,
    Decision,
    Namespace,
    Quantity,
    Scope,
    State,
    check_limit,
    combine,
    leave,
    shrink_to,
)
from karikomi.schedule import Schedule, value_at


@register(
    "clip",
    formula="g_i = g_i * min(1, ratio * gamma_i / |g_i|), gamma_i: running mean of the clipped |g_i|",
    source="Wang et al. 2025, AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient Clipping, "
    "algorithm 1",
)
@dataclass(frozen=True, slots=True)
class AdaGC:
    """Clip every tensor to a multiple of the running mean of its own clipped norms.

    ``g_i = g_i * min(1, ratio * gamma_i / n_i)``, then ``gamma_i = beta * gamma_i + (1 - beta) * n_i`` with the
    norm after clipping. In the first `warmup` steps of a tensor it is scaled by ``min(1, limit / n)``, n
    being the joint norm of all tensors, and ``gamma_i`` is the smallest of its norms after that.

    `ratio`: >= 1, or a schedule of the attempted step; ``inf`` measures only. `beta`: from 0 to below 1.
    `limit`: > 0, in units of the joint norm, or a schedule; ``inf`` does not clip in the warm-up.
    `warmup`: >= 1, accepted steps in which the tensor took part. Raises `InvalidArgument` for other numbers.

    Learns from clipped norms: with raw ones a spike would raise the limit for the spikes that follow
    it. So a limit grows by at most a factor ``beta + (1 - beta) * ratio`` a step. Norms of exactly zero
    teach nothing.

    >>> import numpy as np, karikomi as kk
    >>> rule, state = AdaGC(2.0, beta=0.5, warmup=1), None
    >>> for a in (0.5, 0.5, 8.0):
    ...     grads = {"a": np.array([a]), "b": np.array([0.25])}
    ...     grads, outcome, state = kk.numpy.clip(grads, rule, state)
    >>> grads["a"].tolist(), grads["b"].tolist()
    ([1.0], [0.25])

    Source: Wang et al. 2025, algorithm 1, with its defaults; ``lishuai-97/AdaGC``. Deviations: the warm-up
    is counted per tensor, which is the same where all take part in every step; no 1e-6 beside the
    norm; norms of zero, and non-finite norms never enter. (``pytorch_optimizer`` 3.x divides by the squared
    joint norm in the warm-up, so that a norm of 2 becomes 0.5 with a limit of 1.)
    """

    ratio: float | Schedule = 1.05
    _: KW_ONLY
    beta: float = 0.98
    limit: float | Schedule = 1.0
    warmup: int = 100

    scope = Scope.TENSOR
    of = Quantity.GRADIENT
    adds_up_itself = True  # the joint norm of the warm-up
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        checked = {
            "ratio": check_ratio(self.ratio, where="AdaGC"),
            "beta": check_decay(self.beta, "beta", where="AdaGC"),
            "limit": check_limit(self.limit, where="AdaGC"),
            "warmup": check_count(self.warmup, "the warm-up", where="AdaGC", low=1),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def init(self, like: Array, *, xp: Namespace) -> State:
        """Return ``gamma`` and how many steps of the warm-up were ``seen``, per tensor."""
        return dict.fromkeys(("gamma", "seen"), xp.zeros_like(like))

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
        gamma, seen = state["gamma"], state["seen"]
        warm = seen >= self.warmup
        limit = value_at(self.limit, facts["step"], xp=xp)
        joint = shrink_to(combine(norms, xp=xp), limit, xp=xp)
        ratio = value_at(self.ratio, facts["step"], xp=xp)
        own = shrink_to(norms, ratio_limit(gamma, ratio, norms, xp=xp), xp=xp)
        factor = xp.where(warm, own, joint)
        clipped = norms * factor
        least = xp.where(seen > 0, xp.minimum(gamma, clipped), clipped)
        # A norm too small for its dtype leaves a gamma of zero, which must not drag the next ones down.
        mean = xp.where(gamma > 0, self.beta * gamma + (1.0 - self.beta) * clipped, clipped)
        taught = present & (norms > 0)
        after = {
            "gamma": xp.where(taught, xp.where(warm, mean, least), gamma),
            "seen": xp.where(taught & ~warm, seen + 1, seen),
        }
        return Decision(factor, None, leave(xp)), after
