"""Bounds on the drop of a share from paired counts: examples that were lost, and examples that were gained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from karikomi.audit.paired.share_intervals import share_bound
from karikomi.errors import check

_POINTS, _ROUNDS = 65, 9


@dataclass(frozen=True, slots=True)
class Flips:
    """Counts of n paired examples: `lost` (dense right, small wrong) and `gained` (dense wrong, small right).

    Raises `InvalidArgument` where they are no counts of so many examples.

    >>> Flips.of(np.array([True, True, False]), np.array([True, False, True]))
    Flips(lost=1, gained=1, examples=3)
    """

    lost: int
    gained: int
    examples: int

    def __post_init__(self) -> None:
        counted = (self.lost, self.gained, self.examples)
        whole = all(isinstance(n, int | np.integer) and n >= 0 for n in counted)
        fits = self.examples > 0 and self.lost + self.gained <= self.examples
        check("Flips", (whole and fits, "no counts of paired examples", counted, None))

    @classmethod
    def of(cls, before: np.ndarray, after: np.ndarray) -> Flips:
        """Return the counts of two boolean arrays: which examples each network has right."""
        same = before.shape == after.shape
        check("Flips.of", (same, "the shapes differ", (before.shape, after.shape), None))
        lost, gained = int(np.sum(before & ~after)), int(np.sum(~before & after))
        return cls(lost, gained, before.size)

    @property
    def drop(self) -> float:
        """The drop of the share of right examples, (lost - gained) / n."""
        return (self.lost - self.gained) / self.examples

    @property
    def share(self) -> float:
        """The share of examples that flipped either way."""
        return (self.lost + self.gained) / self.examples


def drop_bound(flips: Flips, *, alpha: float = 0.05) -> float:
    """Return Tango's one-sided upper bound on the true drop, in [-1, 1].

    The d above the observed drop at which the score statistic is -z, with z the upper `alpha` point of the
    normal distribution, b = lost, c = gained:

        (b - c - n d) / sqrt(n (2 q + d (1 - d)))
        q = (sqrt(B^2 + 8 n c d (1 - d)) - B) / (4 n),  B = (2 n - b + c) d - b - c

    where q estimates the probability of a gain under the constraint that the drop is d. `alpha`: in (0, 0.5].

    >>> round(drop_bound(Flips(1, 0, 44)), 3)
    0.096

    Source: Tango 1998, Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design, equations 24-26. Asymptotic: `flip_bound` beside it is exact.
    """
    check_alpha(alpha, where="drop_bound")
    z = NormalDist().inv_cdf(1.0 - alpha)
    low, high = flips.drop, 1.0
    for _ in range(_ROUNDS):
        # Many points at once: a call of NumPy costs as much for one.
        drops = np.linspace(low, high, _POINTS)
        below = score(flips.lost, flips.gained, flips.examples, drops) <= -z
        first = max(int(np.argmax(below)), 1) if below.any() else _POINTS - 1
        low, high = float(drops[first - 1]), float(drops[first])
    return high


def score(
    lost: np.ndarray | int, gained: np.ndarray | int, examples: int, drop: np.ndarray | float
) -> np.ndarray:
    """Return Tango's statistic for the hypothesis that the true drop is `drop`, for numbers or arrays of them.

    Zero where numerator and variance both vanish.
    """
    n = examples
    turn = (2 * n - lost + gained) * drop - lost - gained
    root = np.sqrt(np.maximum(turn * turn + 8 * n * gained * drop * (1 - drop), 0.0))
    gain = (root - turn) / (4 * n)
    variance = n * np.maximum(2 * gain + drop * (1 - drop), 0.0)
    distance = lost - gained - n * drop
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(distance == 0, 0.0, distance / np.sqrt(variance))


def flip_bound(flips: Flips, *, alpha: float = 0.05) -> float:
    """Return the exact one-sided upper bound on the probability of a lost example, which bounds the drop too.

    Beta^-1(1 - alpha; lost + 1, n - lost); 1 where all are lost.

    >>> round(flip_bound(Flips(0, 0, 600)), 5)
    0.00498

    Source: Clopper and Pearson 1934.
    """
    check_alpha(alpha, where="flip_bound")
    return share_bound(flips.lost, flips.examples, alpha)


def check_alpha(alpha: float, *, where: str) -> None:
    """Refuse a level that is not in (0, 0.5]."""
    good = isinstance(alpha, float | int) and math.isfinite(alpha) and 0 < alpha <= 0.5
    check(where, (good, "alpha is the probability of a false certificate", alpha, "(0, 0.5]"))
