"""Bits of integer codes under a density learned from them, and the slope for a gradient.

The penalty of entropy-coded training: the bits that a static coder needs for a tensor's codes, as a function of
weights that are not integers yet. Array operations only, so that a framework computes it where its weights are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class RateModel(NamedTuple):
    """The bits of a code: `zero` of 0, `first` more for magnitude 1 with its sign, `further` more for each beyond.

    ``r(v) = zero + first min(|v|, 1) + further max(|v| - 1, 0)`` between and at integers, with the slope
    ``sign(v) (first if |v| < 1 else further)``, zero at ``v = 0``.

    >>> model = RateModel(zero=0.1, first=6.0, further=1.5)
    >>> [round(float(bits), 2) for bits in model.bits(np.array([0.0, -0.5, 3.0]))]
    [0.1, 3.1, 9.1]
    >>> model.slope(np.array([0.0, -0.5, 3.0])).tolist()
    [0.0, -6.0, 1.5]
    """

    zero: Any
    first: Any
    further: Any

    def bits(self, ratios: Any, xp: Any = np) -> Any:
        """Return the bits of weights that are divided by the step."""
        magnitudes = xp.abs(ratios)
        inner = xp.where(magnitudes < 1, magnitudes, 1.0)
        return self.zero + self.first * inner + self.further * (magnitudes - inner)

    def slope(self, ratios: Any, xp: Any = np) -> Any:
        """Return the derivative of `bits`."""
        return xp.sign(ratios) * xp.where(xp.abs(ratios) < 1, self.first, self.further)

    def total(self, count: Any, nonzero: Any, magnitude: Any) -> Any:
        """Return the bits of `count` codes, of which `nonzero` are not zero, `magnitude` the sum of magnitudes."""
        return count * self.zero + nonzero * self.first + (magnitude - nonzero) * self.further


def fitted(count: Any, nonzero: Any, magnitude: Any, xp: Any = np) -> RateModel:
    """Return the model of the density that fits these codes best: a probability of zero, and a geometric tail.

    ``P(0) = p``, ``P(k) = (1 - p) (1 - theta) theta**(|k| - 1) / 2``, with ``p = (count - nonzero + 1) / (count + 2)``
    and ``1 - theta = (nonzero + 1) / (magnitude + 2)``: the maximum-likelihood estimates, smoothed by one observation
    of each kind, so that all bits are finite. ``zero = -log2 P(0)``, ``first = -log2 P(1) - zero``, ``further =
    -log2 theta``; `first` is at least `further`: no slope ever pushes a weight away from zero.

    `count`: the number of codes; `nonzero`: of those that are not zero; `magnitude`: the sum of magnitudes; numbers
    or 0-d arrays of `xp`. Moving one code from k to k + 1 changes the bits of all under their own best model by the
    slope between them, as the numbers grow: a best fit does not contribute to first order.

    >>> model = fitted(np.float64(1_000), np.float64(20), np.float64(30))
    >>> [round(float(bits), 2) for bits in model]
    [0.03, 7.15, 1.54]

    Source: the penalty is that of Oktay, Ballé, Singh and Shrivastava 2019 (arXiv 1906.06624), whose density is a
    trained network. A free histogram would do for the bits, but its slope is zero between two values that are equally
    frequent, and weights that nothing needs stay there; this density falls everywhere.
    """
    shares = (count - nonzero + 1) / (count + 2), (nonzero + 1) / (magnitude + 2)
    zero, tail, start = (-xp.log(share) / LN2 for share in (shares[0], 1 - shares[1], shares[1]))
    first = start + 1 - xp.log(1 - shares[0]) / LN2 - zero
    return RateModel(zero, xp.where(first > tail, first, tail), tail)


LN2 = float(np.log(2))
