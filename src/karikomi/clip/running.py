"""Means and spreads that are kept up step by step, without ever squaring a norm by itself.

A square of 1e30 overflows float32, one of 1e-30 vanishes; ratios of norms do neither.
"""

from __future__ import annotations

from karikomi.rule import Array, Namespace


def root_mean_square(
    first: Array, weight: Array | float, other: Array, other_weight: Array | float, *, xp: Namespace
) -> Array:
    """Return ``sqrt(weight * one^2 + other_weight * other^2)``, safe against overflow."""
    first, other = xp.abs(first), xp.abs(other)
    largest = xp.maximum(first, other)
    scale = xp.where(largest > 0, largest, xp.ones_like(largest))
    squares = weight * xp.square(first / scale) + other_weight * xp.square(other / scale)
    return scale * xp.sqrt(squares)


def ratio_limit(usual: Array, ratio: Array, otherwise: Array, *, xp: Namespace) -> Array:
    """Return ``ratio * usual`` where something usual is known, else what `otherwise` says."""
    # An infinite ratio of nothing is no number.
    safe = xp.where(usual > 0, usual, xp.ones_like(usual))
    return xp.where(usual > 0, ratio * safe, otherwise)
