"""Update clipping by block RMS: no tensor moves by more than a typical step per entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
    formula="u_i = u_i / max(1, RMS(u_i) / limit) for every tensor i of the update",
    source="Shazeer and Stern 2018, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, section 6",
)
@dataclass(frozen=True, slots=True)
class BlockRMS(Stateless):
    """Scale the update of every tensor whose root mean square exceeds the limit down to it.

    ``u_i = u_i / max(1, RMS(u_i) / limit)`` with ``RMS(u) = |u| / sqrt(entries)``, u being the change of the
    weights in units of the learning rate.

    `limit`: > 0, in units of the learning rate per entry (Adam's updates have an RMS of about 1 at
    most), or a schedule of the attempted step; ``inf`` measures only. Raises `InvalidArgument` for a limit
    that is negative, zero or NaN. Stateless. Acts on updates: only where the step is ours to see.

    >>> import numpy as np
    >>> facts = {"step": np.array(0.0), "sizes": np.array([4.0, 100.0])}
    >>> answer, _ = BlockRMS(1.0).decide(
    ...     np.array([4.0, 4.0]), {}, present=np.array([True, True]), facts=facts, xp=np)
    >>> answer.factor.tolist()
    [0.5, 1.0]

    Source: Shazeer and Stern 2018, section 6; ``optax.clip_by_block_rms``. No deviation.
    """

    limit: float | Schedule = 1.0

    scope = Scope.TENSOR
    of = Quantity.UPDATE
    needs = frozenset({"sizes"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", check_limit(self.limit, where="BlockRMS"))

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
        limit = value_at(self.limit, facts["step"], xp=xp)
        rms = root_mean(norms, facts["sizes"], xp=xp)
        return Decision(shrink_to(rms, limit, xp=xp), None, leave(xp)), state


def root_mean(norms: Array, sizes: Array, *, xp: Namespace) -> Array:
    """Return the root mean squares of tensors from their norms and numbers of entries."""
    return norms / xp.sqrt(xp.maximum(sizes, xp.ones_like(sizes)))
