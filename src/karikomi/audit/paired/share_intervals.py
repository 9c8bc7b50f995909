"""Exact bounds on a share of examples that was counted: by the quantiles of beta distributions."""

from __future__ import annotations

from scipy import special

LEVEL = 0.95


def share_bound(count: int, n: int, alpha: float) -> float:
    """Return the one-sided upper bound on a share, ``Beta^-1(1 - alpha; count + 1, n - count)``; 1 where all count.

    `count`: of `n` examples, 0..n. `alpha`: the probability that the true share lies above, in (0, 1).

    >>> round(share_bound(0, 600, 0.05), 5)
    0.00498

    Source: Clopper and Pearson 1934.
    """
    if count == n:
        return 1.0
    return float(special.betaincinv(count + 1, n - count, 1.0 - alpha))


def share_interval(count: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Return the exact interval of a share; (0, 1) for no examples at all.

    >>> [round(end, 4) for end in share_interval(0, 100)]
    [0.0, 0.0362]

    Source: Clopper and Pearson 1934.
    """
    tail = (1.0 - level) / 2
    # By its own quantile, not as one minus that of the others: a small share would lose its digits.
    low = float(special.betaincinv(count, n - count + 1, tail)) if count else 0.0
    return low, share_bound(count, n, tail)
