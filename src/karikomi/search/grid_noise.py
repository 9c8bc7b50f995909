"""What a few paired seeds can show: Wilson's interval of a share, and paired differences with their t interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

LEVEL = 0.95
MOST_SEEDS = 10_000
SIGN_FLIP_SEEDS = 6
"""With fewer pairs no two-sided sign-flip test reaches 5 %: 2 / 2^5 = 0.0625."""


def wilson(count: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the Wilson score interval of a share `count` of `n`, within [0, 1].

    >>> [round(end, 3) for end in wilson(2, 5)]
    [0.118, 0.769]

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if n == 0:
        return 0.0, 1.0
    z = float(special.ndtri(0.5 + level / 2))
    share, turn = count / n, z * z / n
    middle = (share + turn / 2) / (1 + turn)
    half = z * math.sqrt(share * (1 - share) / n + turn / (4 * n)) / (1 + turn)
    # The ends at 0 and n are exact.
    low, high = middle - half, middle + half
    return (0.0 if count == 0 else max(low, 0.0)), (1.0 if count == n else min(high, 1.0))


@dataclass(frozen=True, slots=True)
class Difference:
    """Differences of paired runs: how many, their mean and standard deviation (None of a single one)."""

    n: int
    mean: float
    sd: float | None

    @classmethod
    def of(cls, first: Sequence[float | None], second: Sequence[float | None]) -> Difference | None:
        """Return first - second over the seeds that both have; None where they share none.

        >>> Difference.of([3.0, 5.0, None], [1.0, 2.0, 9.0])
        Difference(n=2, mean=2.5, sd=0.7071067811865476)
        """
        pairs = zip(first, second, strict=True)
        found = [a - b for a, b in pairs if a is not None and b is not None]
        if not found:
            return None
        mean = math.fsum(found) / len(found)
        if len(found) == 1:
            return cls(1, mean, None)
        squares = math.fsum((value - mean) ** 2 for value in found)
        return cls(len(found), mean, math.sqrt(squares / (len(found) - 1)))

    @property
    def error(self) -> float | None:
        """The standard error of the mean."""
        return None if self.sd is None else self.sd / math.sqrt(self.n)

    @property
    def p(self) -> float | None:
        """The two-sided probability of so large a mean if the true one were 0, by Student's t; None of a single one."""
        if self.error is None:
            return None
        if self.error == 0.0:
            return 1.0 if self.mean == 0.0 else 0.0
        return float(2 * special.stdtr(self.n - 1, -abs(self.mean) / self.error))

    def shows(self) -> float | None:
        """Return the smallest mean that so many pairs with this spread would show at 5 %."""
        return None if self.error is None else _quantile(self.n) * self.error

    def needed(self) -> int | None:
        """Return how many pairs would show a mean as large as this one; None where that is not known.

        The smallest n with ``t(0.975, n - 1) sd / sqrt(n) < |mean|``.

        >>> Difference(3, 1.0, 2.0).needed()
        18
        """
        if self.sd is None or self.mean == 0.0:
            return None
        n = 2
        while _quantile(n) * self.sd / math.sqrt(n) >= abs(self.mean):
            n += 1
            if n > MOST_SEEDS:
                return None
        return n


def adjusted(ps: Sequence[float]) -> list[float]:
    """Return Holm's adjusted probabilities, in the order given.

    >>> adjusted([0.03, 0.01, 0.5])
    [0.06, 0.03, 0.5]

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    found, highest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda k: ps[k])):
        highest = max(highest, min((len(ps) - rank) * ps[place], 1.0))
        found[place] = highest
    return found


def _quantile(n: int) -> float:
    return float(special.stdtrit(n - 1, 0.5 + LEVEL / 2))
