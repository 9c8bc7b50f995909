"""A bound on the mean of paired differences that lie in a known range: cosines, clipped losses, shares of examples."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from karikomi.errors import InvalidArgument, check
from karikomi.search.certificate.flips import check_alpha


def mean_bound(differences: np.ndarray, *, low: float, high: float, alpha: float = 0.05) -> float:
    """Return the one-sided upper bound on the true mean of independent differences in [low, high].

        mean + sqrt(2 V ln(2 / alpha) / n) + 7 (high - low) ln(2 / alpha) / (3 (n - 1))

    with V the sample variance (divided by n - 1). No distribution is assumed. At most `high`.

    Raises `InvalidArgument` for fewer than two differences, a range without extent, differences outside of it.

    >>> wide = np.tile([0.1, -0.1], 5_000)
    >>> round(mean_bound(wide, low=-1, high=1), 5)
    0.00444

    Source: Maurer and Pontil 2009, Empirical Bernstein bounds and sample-variance penalization, theorem 4.
    """
    check_alpha(alpha, where="mean_bound")
    values = np.asarray(differences, dtype=np.float64).reshape(-1)
    check(
        "mean_bound",
        (values.size >= 2, "a variance needs two differences", values.size, ">= 2"),
        (low < high, "the range has no extent", (low, high), "low < high"),
    )
    if not (np.isfinite(values).all() and values.min() >= low and values.max() <= high):
        raise InvalidArgument(
            "a difference lies outside of the stated range",
            where="mean_bound",
            got=(float(values.min()), float(values.max())),
            allowed=(low, high),
        )
    bound = float(values.mean()) + _width(float(values.var(ddof=1)), values.size, high - low, alpha)
    return min(bound, high)


def mean_needed(
    max_drop: float,
    *,
    deviation: float,
    extent: float,
    alpha: float = 0.05,
    power: float = 0.8,
) -> int:
    """Return how many examples certify a mean drop of `max_drop` with probability `power` where the true one is 0.

    `deviation`: the standard deviation of the differences, `extent`: high - low. The least n with
    width(n) + z_power deviation / sqrt(n) <= max_drop.

    >>> mean_needed(0.01, deviation=0.02, extent=0.2)
    295
    """
    check_alpha(alpha, where="mean_needed")
    good = max_drop > 0 and deviation >= 0 and extent > 0 and 0 < power < 1
    got = f"max_drop {max_drop}, deviation {deviation}, extent {extent}, power {power}"
    check("mean_needed", (good, "out of range", got, "> 0, >= 0, > 0, and 0..1"))
    z = max(NormalDist().inv_cdf(power), 0.0)

    def holds(n: int) -> bool:
        width = _width(deviation**2, n, extent, alpha)
        return width + z * deviation / math.sqrt(n) <= max_drop

    high = 2
    while not holds(high):
        high *= 2
    low = high // 2
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _width(variance: float, n: int, extent: float, alpha: float) -> float:
    logarithm = math.log(2 / alpha)
    return math.sqrt(2 * variance * logarithm / n) + 7 * extent * logarithm / (3 * (n - 1))
