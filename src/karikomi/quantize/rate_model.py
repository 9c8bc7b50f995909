"""Bits of integer codes under a density learned from their counts, and their slope for a gradient.

The penalty of entropy-coded training: the bits that a static coder needs for a tensor's codes, as a function of
weights that are not integers yet. Array operations only, so that a framework computes it where its weights are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

UNIFORM = 0.01
"""The share of a uniform density in the prior, without which large magnitudes underflow."""


def bits_of_magnitudes(counts: Any, *, strength: float = 1.0, xp: Any = np) -> Any:
    """Return the bits of a code of each magnitude, its sign included, under a density learned from counts.

    ``bits[m] = -log2((n[m] + strength q[m]) / (sum(n) + strength)) + (m > 0)``, made non-decreasing in ``m``. `q` is
    the two-sided geometric density with the mean magnitude of the counts (one code of magnitude 1 is added), mixed with
    a hundredth of a uniform one, which gives finite bits to magnitudes that have not occurred.

    `counts`: floats of shape ``(L + 1,)``, how often ``|code| = m`` occurs; `strength` > 0, in codes; the result is
    in bits, of the same shape. `xp`: the array operations (NumPy's, or those of a framework under these names).

    >>> bits_of_magnitudes(np.array([6.0, 2.0, 0.0])).round(2).tolist()
    [0.42, 3.01, 8.75]

    Source: the plug-in entropy of a static coder's table, symmetric in the sign; the penalty is that of Oktay, Ballé,
    Singh and Shrivastava 2019 (arXiv 1906.06624), whose density is a trained network.
    """
    magnitudes = xp.asarray(xp.arange(counts.shape[0]), dtype=counts.dtype)
    total = xp.sum(counts)
    prior = _geometric((xp.sum(counts * magnitudes) + 1) / (total + 1), magnitudes, xp)
    shares = (counts + strength * prior) / (total + strength)
    signed = xp.where(magnitudes > 0, shares / 2, shares)
    bits = -xp.log(signed) / float(np.log(2))
    # Never cheaper further out: the slope would push weights away from zero.
    earlier = xp.reshape(magnitudes, (-1, 1)) >= xp.reshape(magnitudes, (1, -1))
    return xp.max(xp.where(earlier, xp.reshape(bits, (1, -1)), 0.0), axis=1)


def _geometric(mean: Any, magnitudes: Any, xp: Any) -> Any:
    """Return the two-sided geometric density of magnitudes, ``P(|k| = m) ~ (1 + (m > 0)) theta**m``, in part uniform."""
    theta = mean / (1 + xp.sqrt(1 + mean * mean))
    powers = xp.exp(magnitudes * xp.log(theta))
    both = xp.where(magnitudes > 0, 2 * powers, powers)
    even = xp.where(magnitudes > 0, 2 + 0 * powers, 1 + 0 * powers)
    return (1 - UNIFORM) * both / xp.sum(both) + UNIFORM * even / xp.sum(even)


def interpolated_bits(ratios: Any, bits: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the bits of weights between codes, and the slope: ``bits`` of `bits_of_magnitudes`, joined by lines.

    ``r(v) = bits[k] + (|v| - k) (bits[k + 1] - bits[k])`` with ``k = floor(|v|)``; constant beyond the last code;
    ``dr/dv = sign(v) (bits[k + 1] - bits[k])``, zero at ``v = 0``. At integers it is the bits of that code. Moving
    a code by one changes ``sum(n) H(n / sum(n))``, the size of a coded tensor, by exactly this slope as ``n`` grows:
    the density itself, which is learned from the counts, does not contribute to first order.

    `ratios`: weights divided by the step, of any shape. Returns two arrays of that shape, in bits and bits per code.

    >>> values, slopes = interpolated_bits(np.array([0.5, -1.5, 9.0]), np.array([0.5, 3.0, 7.0]))
    >>> values.tolist(), slopes.tolist()
    ([1.75, 5.0, 7.0], [2.5, -4.0, 0.0])
    """
    last = len(bits) - 1
    magnitudes = np.minimum(np.abs(ratios), last)
    lower = np.floor(magnitudes).astype(np.int64)
    rises = np.append(np.diff(bits), 0.0)[lower]
    return bits[lower] + (magnitudes - lower) * rises, np.sign(ratios) * rises
