"""Two networks on the same examples: what was lost, gained and otherwise changed, each with its interval.

With b examples that only the first network has right and c that only the second has right, of n:
drop = (b - c) / n, negative flips = b / n, positive flips = c / n, churn = share of changed predictions. Two
networks of equal accuracy can have many of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from karikomi.audit.paired.share_intervals import LEVEL, share_interval


@dataclass(frozen=True, slots=True, eq=False)
class PairedOutcomes:
    """Whether each of n predictions is right in the first and in the second network, and whether it changed."""

    before: np.ndarray
    after: np.ndarray
    changed: np.ndarray

    @property
    def lost(self) -> int:
        """Examples that only the first network has right: negative flips."""
        return int(np.sum(self.before & ~self.after))

    @property
    def gained(self) -> int:
        """Examples that only the second network has right: positive flips."""
        return int(np.sum(self.after & ~self.before))

    def take(self, chosen: np.ndarray) -> PairedOutcomes:
        """Return some of the examples."""
        return PairedOutcomes(self.before[chosen], self.after[chosen], self.changed[chosen])

    def facts(self) -> dict[str, Any]:
        """Return drop, flips and churn as shares, each with a 95 % interval."""
        n, lost, gained, churn = len(self.before), self.lost, self.gained, int(self.changed.sum())
        low, high = drop_interval(lost, gained, n)
        return {
            "drop": (lost - gained) / n,
            "drop_interval": [low, high],
            "negative_flips": lost / n,
            "negative_flips_interval": list(share_interval(lost, n)),
            "positive_flips": gained / n,
            "positive_flips_interval": list(share_interval(gained, n)),
            "churn": churn / n,
            "churn_interval": list(share_interval(churn, n)),
        }


def drop_interval(lost: int, gained: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the interval of (lost - gained) / n of paired examples.

    Half a flip is added to both counts, so that no flip at all is no certainty:
    ``d +- z sqrt((b + c + 1 - (b - c)**2 / n)) / n``.

    >>> [round(end, 4) for end in drop_interval(12, 4, 1000)]
    [-0.0001, 0.016]

    Source: Agresti and Min 2005 (the Wald interval with half a count added to each cell).
    """
    z = -float(special.ndtri((1.0 - level) / 2))
    b, c, total = lost + 0.5, gained + 0.5, n + 2.0
    middle = (b - c) / total
    spread = z * float(np.sqrt(max(b + c - (b - c) ** 2 / total, 0.0))) / total
    return middle - spread, middle + spread


def mcnemar(lost: int, gained: int) -> float:
    """Return the probability of so many lost examples or more, if a flip is as likely to help as to harm.

    One-sided and exact; half of the probability of the counts themselves (mid-p), as the exact test is conservative.

    >>> round(mcnemar(8, 1), 4), mcnemar(0, 0)
    (0.0107, 0.5)

    Source: McNemar 1947; the mid-p version after Fagerland, Lydersen and Laake 2013.
    """
    flips = lost + gained
    return float(special.bdtrc(lost, flips, 0.5) + special.bdtrc(lost - 1, flips, 0.5)) / 2


def holm(values: np.ndarray) -> np.ndarray:
    """Return adjusted p-values: reject what is at most alpha, and all errors together have that probability.

    >>> holm(np.array([0.01, 0.04, 0.03])).round(3).tolist()
    [0.03, 0.06, 0.06]

    Source: Holm 1979.
    """
    count = len(values)
    order = np.argsort(values, kind="stable")
    scaled = np.maximum.accumulate(values[order] * (count - np.arange(count)))
    adjusted = np.empty(count)
    adjusted[order] = np.minimum(scaled, 1.0)
    return adjusted


def least_lost(tests: int, alpha: float) -> int:
    """Return the fewest one-way flips that a test can find among `tests`; no slice with fewer can be named.

    >>> least_lost(10, 0.05), least_lost(1, 0.05)
    (7, 4)
    """
    lost = 1
    while mcnemar(lost, 0) * tests > alpha:
        lost += 1
    return lost
