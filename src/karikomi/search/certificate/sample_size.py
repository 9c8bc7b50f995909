"""Whether so many examples can certify a budget at all, and how many would: stated before the search."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy import special

from karikomi.errors import check
from karikomi.search.certificate.flips import check_alpha, score

FLIPS = 0.02
"""The share of examples that flip either way, where none was measured: of 8-bit and lightly pruned networks."""

_DEVIATIONS = 8.0
_GROWTH = 1.01


@dataclass(frozen=True, slots=True)
class Feasibility:
    """What `examples` can certify of a budget: the least number at all, the number needed, and the power.

    `verdict`: ``"can"`` (with the power that was asked for, where the true drop is 0), ``"unlikely"``, or
    ``"cannot"``: not even a network that changes no prediction would be certified.
    """

    max_drop: float
    examples: int
    least: int
    needed: int
    power: float
    flips: float
    alpha: float

    @property
    def verdict(self) -> str:
        """``"can"``, ``"unlikely"`` or ``"cannot"``."""
        if self.examples < self.least:
            return "cannot"
        return "can" if self.examples >= self.needed else "unlikely"

    def sentence(self) -> str:
        """Return what a user should know before the search."""
        level = f"{100 * (1 - self.alpha):g} %"
        if self.verdict == "cannot":
            return (
                f"{self.examples:,} examples cannot certify a drop of at most {self.max_drop:g} at {level}, not even"
                f" for a network without any changed prediction: that takes {self.least:,}, and"
                f" {self.needed:,} at {100 * self.flips:g} % of changed predictions"
            )
        if self.verdict == "unlikely":
            return (
                f"{self.examples:,} examples certify a drop of at most {self.max_drop:g} at {level} with probability"
                f" {self.power:.2f} where the true drop is 0 and {100 * self.flips:g} % of the predictions change;"
                f" {self.needed:,} would be needed"
            )
        return (
            f"{self.examples:,} examples can certify a drop of at most {self.max_drop:g} at {level}"
            f" ({self.needed:,} are needed at {100 * self.flips:g} % of changed predictions)"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, the verdict and the sentence, for a result."""
        figures = {name: getattr(self, name) for name in type(self).__slots__}
        return {**figures, "verdict": self.verdict, "sentence": self.sentence()}


def feasibility(
    max_drop: float, examples: int, *, flips: float = FLIPS, alpha: float = 0.05, at: float = 0.8
) -> Feasibility:
    """Return what so many paired examples can certify of a budget on a share.

    `flips`: the expected share of changed predictions; `at`: the power that counts as certain enough.

    >>> print(feasibility(0.005, 500).verdict, feasibility(0.005, 500).least)
    cannot 539
    """
    _check(max_drop, flips, alpha)
    check("feasibility", (examples >= 1, "there are no examples", examples, ">= 1"))
    chance = power(max_drop, examples, flips=flips, alpha=alpha)
    return Feasibility(
        max_drop=max_drop,
        examples=examples,
        least=least(max_drop, alpha=alpha),
        needed=needed(max_drop, flips=flips, alpha=alpha, at=at),
        power=chance,
        flips=flips,
        alpha=alpha,
    )


def least(max_drop: float, *, alpha: float = 0.05) -> int:
    """Return the least number of examples that certify a budget where no prediction changed.

    z^2 (1 - x) / x: there the bound of Tango is z^2 / (n + z^2).

    >>> least(0.005), least(0.01)
    (539, 268)
    """
    _check(max_drop, 0.0, alpha)
    z = NormalDist().inv_cdf(1.0 - alpha)
    return max(math.ceil(z * z * (1.0 - max_drop) / max_drop), 1)


def power(
    max_drop: float, examples: int, *, flips: float = FLIPS, alpha: float = 0.05, drop: float = 0.0
) -> float:
    """Return the probability that a network with a true `drop` is certified, summed over all likely counts.

    `flips`: the true share of changed predictions, at least `drop`.

    >>> round(power(0.005, 5_000), 2)
    0.79
    """
    _check(max_drop, flips, alpha)
    good = 0 <= drop <= flips
    check("power", (good, "a drop needs as many flips", drop, f"0..{flips}"))
    z = NormalDist().inv_cdf(1.0 - alpha)
    total = _likely(examples, flips)
    lost_share = (flips + drop) / (2 * flips) if flips else 0.0
    chance = 0.0
    for changed, weight in zip(total, _binomial(examples, flips, total), strict=True):
        lost = _likely(int(changed), lost_share)
        passes = score(lost, changed - lost, examples, max_drop) <= -z
        chance += float(weight) * float(_binomial(int(changed), lost_share, lost)[passes].sum())
    return min(chance, 1.0)


def needed(max_drop: float, *, flips: float = FLIPS, alpha: float = 0.05, at: float = 0.8) -> int:
    """Return how many paired examples certify a budget with the power `at`, where the true drop is 0.

    Begins at (z_alpha + z_power)^2 flips / x^2 and grows by steps of 1 % until `power` is there.

    >>> 4_947 <= needed(0.005, flips=0.02) < 5_250
    True
    """
    _check(max_drop, flips, alpha)
    check("needed", (0 < at < 1, "the power is a probability", at, "(0, 1)"))
    normal = NormalDist()
    reach = normal.inv_cdf(1 - alpha) + max(normal.inv_cdf(at), 0.0)
    n = max(math.ceil(reach**2 * flips / max_drop**2), least(max_drop, alpha=alpha))
    while power(max_drop, n, flips=flips, alpha=alpha) < at:
        n = math.ceil(n * _GROWTH)
    return n


def smallest_budget(
    examples: int, *, flips: float = FLIPS, alpha: float = 0.05, at: float = 0.8
) -> float:
    """Return the smallest drop that so many examples certify with the power `at`, where the true one is 0.

    >>> 0.005 < smallest_budget(1_000) < 0.013
    True
    """
    return _smallest(lambda x: power(x, examples, flips=flips, alpha=alpha) >= at)


def _smallest(holds: Callable[[float], bool]) -> float:
    low, high = 0.0, 1.0 - 1e-9
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _likely(n: int, share: float) -> np.ndarray:
    """Return the counts that a binomial takes with all but a negligible probability."""
    reach = _DEVIATIONS * math.sqrt(n * share * (1 - share)) + _DEVIATIONS
    low, high = max(math.floor(n * share - reach), 0), min(math.ceil(n * share + reach), n)
    return np.arange(low, high + 1)


def _binomial(n: int, share: float, counts: np.ndarray) -> np.ndarray:
    ways = special.gammaln(n + 1) - special.gammaln(counts + 1) - special.gammaln(n - counts + 1)
    return np.exp(ways + special.xlogy(counts, share) + special.xlog1py(n - counts, -share))


def _check(max_drop: float, flips: float, alpha: float) -> None:
    check_alpha(alpha, where="feasibility")
    check(
        "feasibility",
        (0 < max_drop < 1, "a drop of a share that can be certified", max_drop, "(0, 1)"),
        (0 <= flips <= 1, "flips is a share of the examples", flips, "0..1"),
    )
