"""EMA ratio: the limit is a multiple of the running mean of the norms, of all tensors or of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.clip.arguments import SCOPES, check_choice, check_decay, check_ratio
from karikomi.clip.running import ratio_limit
from karikomi.registry import register
from karikomi.rule import Array, Decision, Namespace, Quantity, Scope, State, leave, shrink_to
from karikomi.schedule import Schedule, value_at


@register(
    "clip",
    formula="g = g * min(1, ratio * mean / |g|), mean: running mean of |g| after clipping, bias-corrected",
    source="Groeneveld et al. 2024, OLMo: Accelerating the Science of Language Models (its code, olmo/optim.py)",
)
@dataclass(frozen=True, slots=True)
class EMARatio:
    """Clip to a multiple of the running mean of the norms so far.

    ``g = g * min(1, ratio * mean / n)``, then ``mean = beta * mean + (1 - beta) * n``, divided by ``1 - beta^t`` when
    it is used, so that after one step it is the norm of that step. The first step is not clipped.

    `ratio`: >= 1, or a schedule of the attempted step; ``inf`` measures only. `beta`: from 0 to below 1.
    `per`: ``"global"`` for one factor from the joint norm, ``"tensor"`` for each tensor on its own. `learn`:
    ``"clipped"`` or ``"raw"``. Raises `InvalidArgument` for other values.

    Learns from clipped norms unless told otherwise: a raw spike of 1,000 times the mean would lift the
    limit elevenfold, and it would still be doubled 200 steps later. The price is that after a real
    change of scale the limit grows by at most a factor ``beta + (1 - beta) * ratio`` a step; ``"raw"``
    follows at once. Norms of exactly zero teach nothing.

    >>> import numpy as np, karikomi as kk
    >>> rule, state = EMARatio(2.0, beta=0.5), None
    >>> for size in (1.0, 1.0, 50.0):
    ...     grads, outcome, state = kk.numpy.clip({"w": np.array([size])}, rule, state)
    >>> outcome.pre, round(outcome.post, 6)
    (50.0, 2.0)

    Source: ``max_grad_norm_ratio`` of OLMo 1 (``olmo/optim.py``), per tensor. Deviations: the mean of the norms,
    there the norm of the mean gradient (Adam's first moment), which is smaller and needs its
    optimizer; bias-corrected, there a constant limit where nothing is known; no 1e-6 beside the norm.
    """

    ratio: float | Schedule = 2.0
    _: KW_ONLY
    beta: float = 0.99
    per: str = "global"
    learn: str = "clipped"

    of = Quantity.GRADIENT
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_ratio(self.ratio, where="EMARatio"))
        object.__setattr__(self, "beta", check_decay(self.beta, "beta", where="EMARatio"))
        check_choice(self.per, "per", SCOPES, where="EMARatio")
        check_choice(self.learn, "learn", ("clipped", "raw"), where="EMARatio")

    @property
    def scope(self) -> Scope:
        """Global or tensor, as `per` says."""
        return SCOPES[self.per]

    def init(self, like: Array, *, xp: Namespace) -> State:
        """Return the ``mean`` before its correction, and its ``weight``, which tends to 1."""
        return dict.fromkeys(("mean", "weight"), xp.zeros_like(like))

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return one factor per number."""
        mean, weight = state["mean"], state["weight"]
        usual = mean / xp.where(weight > 0, weight, xp.ones_like(weight))
        ratio = value_at(self.ratio, facts["step"], xp=xp)
        factor = shrink_to(norms, ratio_limit(usual, ratio, norms, xp=xp), xp=xp)
        seen = norms * factor if self.learn == "clipped" else norms
        taught = present & (norms > 0)
        after = {
            "mean": xp.where(taught, self.beta * mean + (1.0 - self.beta) * seen, mean),
            "weight": xp.where(taught, self.beta * weight + (1.0 - self.beta), weight),
        }
        return Decision(factor, None, leave(xp)), after
