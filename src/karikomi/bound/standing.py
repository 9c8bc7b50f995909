"""Which numbers are at the bound after it was applied: a metric of every bound.

It is a property of the result and not of the decision: a unit that was scaled onto the bound some steps ago
is still at it, although it is not scaled any more.
"""

from __future__ import annotations

import numpy as np

from karikomi.bound.extent import SLACK
from karikomi.rule import Rule, Scope, combine, order_of
from karikomi.schedule import value_at


def standing(rule: Rule, after: np.ndarray, factor: np.ndarray, *, attempted: int) -> np.ndarray:
    """Return one boolean per number: whether it is at the rule's limit, or was scaled to it.

    `after`: the numbers after the bound. `factor`: the factors they were scaled by. `attempted`: the number of
    steps before this one, for a limit that is a schedule. For a rule without a field ``limit``, and for projections,
    those that it moved are at its bound.

    >>> import karikomi as kk
    >>> rule = kk.bound.MaxNorm(2.0)
    >>> standing(rule, np.array([2.0, 1.0, 2.0]), np.array([0.5, 1.0, 1.0]), attempted=0).tolist()
    [True, False, True]
    """
    limit = getattr(rule, "limit", None)
    if limit is None or "distance" in rule.needs:
        return factor != 1.0
    if rule.scope is Scope.GLOBAL:
        after = np.full_like(after, combine(after, xp=np, order=order_of(rule))[0])
    reached = float(value_at(limit, np.asarray(float(attempted)), xp=np))
    return (factor != 1.0) | ((after >= reached * (1.0 - SLACK)) & (reached > 0.0))
