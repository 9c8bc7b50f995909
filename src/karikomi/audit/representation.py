"""Where in a network its activations changed: centred kernel alignment, without bias, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

LEAST = 4
"""Examples that the unbiased estimate needs."""


def alignment(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the linear CKA of two sets of activations, from batches (n, features), features may differ in number.

    ``CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))`` with K = X X^T, each the mean over batches of the unbiased
    ``HSIC_1 = [tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 / (n-2) 1'K L 1] / (n (n-3))``, diagonals zero. 1 for what
    is equal up to rotation and scale; can fall outside of [0, 1]. NaN where the activations do not vary, or with
    fewer than four examples in every batch.

    >>> x = np.random.default_rng(0).normal(size=(64, 5))
    >>> turn = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    >>> round(alignment([(x, 3.0 * x @ turn)]), 6)
    1.0

    Source: Kornblith et al. 2019; Song et al. 2012 (unbiased); Nguyen, Raghu and Kornblith 2021 (batches).
    """
    sums = np.zeros(3)
    for first, second in pairs:
        if len(first) >= LEAST:
            own, other = _gram(first), _gram(second)
            sums += [_hsic(own, other), _hsic(own, own), _hsic(other, other)]
    shared, alone, beside = sums.tolist()
    known = alone > 0 and beside > 0
    return shared / float(np.sqrt(alone * beside)) if known else float("nan")


def _gram(rows: np.ndarray) -> np.ndarray:
    wide = rows.reshape(len(rows), -1).astype(np.float64)
    # The estimate does not depend on shifts; without the mean, squares of large activations do not swamp it.
    wide = wide - wide.mean(axis=0)
    peak = float(np.abs(wide).max(initial=0.0))
    wide /= peak or 1.0
    gram = wide @ wide.T
    np.fill_diagonal(gram, 0.0)
    return gram


def _hsic(first: np.ndarray, second: np.ndarray) -> float:
    n = len(first)
    sums = first.sum(axis=0), second.sum(axis=0)
    total = sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2))
    cross = (first * second).sum() + total - 2.0 / (n - 2) * sums[0] @ sums[1]
    return float(cross) / (n * (n - 3))
