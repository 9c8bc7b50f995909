"""Spectral cap: no weight matrix stretches any input by more than the limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from karikomi.bound.extent import SLACK
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
    "bound",
    formula="W = W * min(1, limit / sigma(W)), sigma the largest singular value",
    source="Yoshida and Miyato 2017; Miyato et al. 2018, Spectral Normalization (power iteration)",
)
@dataclass(frozen=True, slots=True)
class SpectralCap(Stateless):
    """Keep the largest singular value of every weight at or below the limit.

    ``W = W * min(1, limit / sigma(W))``. A weight is the matrix (output units, all the rest): for a
    convolution that is its kernel, not the operator on images; stacked gates and stacked attention
    projections are one matrix. Sigma is followed by power iteration from a few vectors that are kept
    between steps; the estimate is never above sigma, and within 1e-3 of it while a step moves the
    weights by little. The vectors belong to the framework folder and travel in the state.

    `limit`: > 0, in units of a singular value, or a schedule; ``inf`` measures only. Raises
    `InvalidArgument` for a limit that is negative, zero or NaN. The rule itself learns nothing.

    >>> import numpy as np, karikomi as kk
    >>> weights = {"w": np.array([[3.0, 0.0], [0.0, 1.0]])}
    >>> bounded, outcome, state = kk.numpy.bound(weights, SpectralCap(1.5), unit_axes={"w": 0})
    >>> bounded["w"].round(6).tolist(), outcome.share_at_bound
    ([[1.5, 0.0], [0.0, 0.5]], 1.0)

    Source: Yoshida and Miyato 2017; power iteration as Miyato et al. 2018, section 2.1. Deviations:
    a cap and not a division by sigma at every forward pass; eight vectors and not one; iterations until
    the estimate stands still, where one from a random vector may miss most of sigma.
    """

    limit: float | Schedule

    scope = Scope.TENSOR
    of = Quantity.WEIGHT
    needs = frozenset({"spectral_norm"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="SpectralCap"))

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        """Return one factor per tensor; `norms` are largest singular values."""
        limit = value_at(self.limit, facts["step"], xp=xp)
        return Decision(shrink_to(norms, limit, xp=xp, slack=SLACK), None, leave(xp)), state
