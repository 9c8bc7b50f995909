"""The bound that fits: Tango's where each example is right or wrong, Maurer and Pontil's for means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from karikomi.errors import InvalidArgument, check
from karikomi.search.certificate.flips import Flips, drop_bound, flip_bound
from karikomi.search.certificate.in_sequence import DropBound
from karikomi.search.certificate.paired_means import mean_bound

TANGO = "Tango 1998, score interval of paired shares"
BERNSTEIN = "Maurer and Pontil 2009, empirical Bernstein bound of a mean"


@dataclass(frozen=True, slots=True, eq=False)
class PairedDrop:
    """One number per example: by how much the candidate is worse there, in the unit of the metric.

    `shares`: whether each is -1, 0 or 1 because an example is right or wrong. `clip`: differences above it count
    as it (and those below -clip as -clip, which only raises the mean), and are counted in `beyond`.
    """

    differences: np.ndarray
    shares: bool
    clip: float

    @property
    def drop(self) -> float:
        """The observed drop, without clipping."""
        return float(self.differences.mean())

    @property
    def beyond(self) -> int:
        """How many differences are above the clip, whose excess is not covered by the bound."""
        return int(np.sum(self.differences > self.clip))

    def tested(self, alpha: float) -> DropBound:
        """Return the observed drop with its upper bound at the level `alpha`."""
        n = self.differences.size
        if self.shares:
            lost, gained = (int(np.sum(self.differences == side)) for side in (1, -1))
            flips = Flips(lost, gained, n)
            beside = {"flips exact": flip_bound(flips, alpha=alpha), "lost": lost, "gained": gained}
            return DropBound(flips.drop, drop_bound(flips, alpha=alpha), n, TANGO, beside)
        clipped = np.clip(self.differences, -self.clip, self.clip)
        bound = mean_bound(clipped, low=-self.clip, high=self.clip, alpha=alpha)
        beside = {"clip": self.clip, "beyond the clip": self.beyond}
        return DropBound(self.drop, bound, n, BERNSTEIN, beside)


def paired_drop(
    before: np.ndarray, after: np.ndarray, *, sign: int, clip: float = 1.0
) -> PairedDrop:
    """Return the paired drop of two arrays of one number per example, of which the metric is the mean.

    `sign`: 1 where a higher metric is better, -1 where a lower one is. `clip`: the bound on one difference; for
    numbers in [0, 1] it is 1, and covers all. Arrays of 0 and 1 only are shares.

    >>> paired_drop(np.array([1.0, 1.0]), np.array([1.0, 0.0]), sign=1).tested(0.05).drop
    0.5
    """
    check(
        "paired_drop",
        (
            before.shape == after.shape and before.ndim == 1,
            "pairs differ",
            after.shape,
            before.shape,
        ),
        (sign in (1, -1), "the sign of the metric", sign, "1 or -1"),
        (clip > 0, "clip is a bound on a difference", clip, "> 0"),
    )
    if not np.isfinite(before).all():
        raise InvalidArgument("the dense network's scores are not finite", where="paired_drop")
    binary = all(np.isin(array, (0, 1)).all() for array in (before, after))
    # A score that is NaN is as bad as any.
    worse = np.nan_to_num(sign * (before - after), nan=clip, posinf=clip, neginf=-clip)
    return PairedDrop(worse.astype(np.float64), bool(binary), float(clip))
