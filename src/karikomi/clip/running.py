"""Running means and spreads without squares of single norms.

The square of 1e30 overflows float32, that of 1e-30 underflows; squares of ratios of norms do neither.
"""

from __future__ import annotations

from karikomi.rule import Array, Namespace


def root_mean_square(
    first: Array, weight: Array | float, other: Array, other_weight: Array | float, *, xp: Namespace
) -> Array:
    """Return ``sqrt(weight * first^2 + other_weight * other^2)``, safe against overflow."""
    first, other = xp.abs(first), xp.abs(other)
    largest = xp.maximum(first, other)
    scale = xp.where(largest > 0, largest, xp.ones_like(largest))
    squares = weight * xp.square(first / scale) + other_weight * xp.square(other / scale)
    return scale * xp.sqrt(squares)


def ratio_limit(usual: Array, ratio: Array, otherwise: Array, *, xp: Namespace) -> Array:
    """Return ``ratio * usual`` where `usual` is positive, else `otherwise`."""
    # An infinite ratio of zero is NaN.
    safe = xp.where(usual > 0, usual, xp.ones_like(usual))
    return xp.where(usual > 0, ratio * safe, otherwise)
