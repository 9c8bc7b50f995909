"""Which numbers stand at the bound once it was applied: the metric that every bound reports.

Separate because it speaks of what apply left, not of what the rule decided: a unit that came to rest
on the ball some steps ago stands there still, though nothing scales it any more.
"""

from __future__ import annotations

import numpy as np

from karikomi.bound.extent import SLACK
from karikomi.rule import Rule
from karikomi.schedule import value_at


def standing(rule: Rule, after: np.ndarray, factor: np.ndarray, *, attempted: int) -> np.ndarray:
    """Return one boolean per number: whether it is at the rule's limit, or was brought to it.

    `after`: the numbers after the bound. `factor`: what they were scaled by. `attempted`: how many
    steps came before this one, for a limit that is a schedule. A rule without a field ``limit`` has
    at its bound what it scaled.

    >>> import karikomi as kk
    >>> rule = kk.bound.MaxNorm(2.0)
    >>> standing(rule, np.array([2.0, 1.0, 2.0]), np.array([0.5, 1.0, 1.0]), attempted=0).tolist()
    [True, False, True]
    """
    limit = getattr(rule, "limit", None)
    if limit is None:
        return factor != 1.0
    reached = float(value_at(limit, np.asarray(float(attempted)), xp=np))
    return (factor != 1.0) | ((after >= reached * (1.0 - SLACK)) & (reached > 0.0))
