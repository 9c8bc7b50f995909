"""Adaptive gradient clipping (AGC): every output unit in proportion to the norm of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from karikomi.clip.arguments import check_choice, check_number, check_order
from karikomi.errors import Unsupported
from karikomi.registry import register
from karikomi.rule import (
    Array,
    Decision,
    Namespace,
    Quantity,
    Scope,
    State,
    Stateless,
    check_limit,
    leave,
    shrink_to,
)
from karikomi.schedule import Schedule, value_at


@register(
    "clip",
    formula="g_u = g_u * min(1, limit * max(|w_u|, eps) / |g_u|) for every output unit u",
    source="Brock, De, Smith and Simonyan 2021, High-Performance Large-Scale Image Recognition Without "
    "Normalization, section 4",
)
@dataclass(frozen=True, slots=True)
class AGC(Stateless):
    """Scale the gradient of every output unit to at most a share of the norm of its weights.

    ``g_u = g_u * min(1, limit * max(|w_u|, eps) / |g_u|)`` for each unit u: a row of a linear layer, a
    filter of a convolution; a gain or a bias is one unit as a whole.

    `limit`: > 0, without unit (gradient norm per weight norm), or a schedule of the attempted step;
    ``inf`` measures only. `eps`: > 0, in units of weights: what counts as the norm of weights that are
    smaller, so that a unit that starts at zero can leave it. `unit`: ``"layer"`` for the unit that the layer's type
    has, or by the rank of the tensor as other libraries do, to compare runs with theirs: ``"timm"`` (index of axis 0)
    or ``"optax"`` (index of the last axis; of three axes, of the last two). `norm`: p of both norms, from 1 to
    ``inf``. Raises `InvalidArgument` for other values. Stateless. Leave embeddings and the last layer out, as the
    paper does, with `Groups`.

    >>> import numpy as np
    >>> facts = {"step": np.array(0.0), "weights": np.array([2.0, 0.0])}
    >>> answer, _ = AGC(0.1, eps=0.5).decide(
    ...     np.array([1.0, 0.04]), {}, present=np.array([True, True]), facts=facts, xp=np)
    >>> answer.factor.tolist()
    [0.2, 1.0]

    Source: Brock et al. 2021, section 4; their ``nfnets/agc_optax.py``, whose defaults these are.
    Deviations: a unit's axis is the layer's to know and not guessed from the rank (three libraries guess
    three ways) unless `unit` says so; no floor of 1e-6 under the gradient's norm, and a norm that equals the limit
    keeps its bits.
    """

    limit: float | Schedule = 0.01
    _: KW_ONLY
    eps: float = 1e-3
    unit: str = "layer"
    norm: float = 2.0

    scope = Scope.UNIT
    of = Quantity.GRADIENT
    needs = frozenset({"weights"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="AGC"))
        eps = check_number(self.eps, "eps", where="AGC", low=0.0, open_low=True)
        object.__setattr__(self, "eps", eps)
        check_choice(self.unit, "unit", ("layer", "timm", "optax"), where="AGC")
        object.__setattr__(self, "norm", check_order(self.norm, where="AGC"))

    @property
    def order(self) -> float:
        """The p of the norms that are measured, of gradients and of weights."""
        return self.norm

    def axes_by_rank(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the axes of one unit of a tensor of this shape, none for a tensor that is one unit."""
        rank = len(shape)
        if self.unit == "timm":
            return (0,) if rank > 1 else ()
        if sum(length != 1 for length in shape) <= 1:
            return ()
        if rank > 5:
            raise Unsupported("optax has no unit for so many axes", where="AGC", got=shape)
        return (1, 2) if rank == 3 else (rank - 1,)

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return one factor per unit."""
        limit = value_at(self.limit, facts["step"], xp=xp)
        weights = facts["weights"]
        allowed = limit * xp.maximum(weights, self.eps * xp.ones_like(weights))
        return Decision(shrink_to(norms, allowed, xp=xp), None, leave(xp)), state
