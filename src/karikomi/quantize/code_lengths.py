"""How many bits codes take in an ideal entropy coder of order 0, its table included."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SYMBOL_BITS = 8.0
"""Bits of a symbol in a frequency table, about what `karikomi.pack` needs."""
MOST_COUNTED = 1 << 20
"""The widest range of codes that is counted in an array, which is faster than sorting them."""
_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class CodeLengths:
    """Bits of the codes ``-limit .. limit``: ``-log2`` of their frequencies, smoothed.

    `bits`: float64 of shape ``(2 limit + 1,)``. Codes beyond take the bits of the last.

    >>> lengths = CodeLengths.measured(np.array([0, 0, 0, 1]), 1)
    >>> lengths.of(np.array([0, 1])).round(1).tolist()
    [0.4, 2.0]
    """

    bits: NDArray[np.float64]

    @classmethod
    def measured(cls, codes: NDArray[np.integer], limit: int) -> CodeLengths:
        """Return the lengths for codes as frequent as these; two hundredths of them follow a Laplace distribution.

        The smoothing gives codes that do not occur a finite length.
        """
        flat = np.clip(codes.reshape(-1).astype(np.int64), -limit, limit)
        counts = np.bincount(flat + limit, minlength=2 * limit + 1).astype(np.float64)
        width = max(float(np.abs(flat).mean()) if flat.size else 0.0, 0.1)
        decay = np.exp(-np.abs(np.arange(-limit, limit + 1)) / width)
        shares = (1.0 - _SHARE) * counts / max(flat.size, 1) + _SHARE * decay / decay.sum()
        return cls(-np.log2(np.maximum(shares, 1e-30)))

    def of(self, codes: NDArray) -> NDArray[np.float64]:
        """Return the bits of each code."""
        limit = self.bits.size // 2
        return self.bits[(np.clip(codes, -limit, limit) + limit).astype(np.int64)]


def entropy_bits(codes: NDArray[np.integer]) -> float:
    """Return the bits of all codes under their own frequencies, without a table.

    >>> entropy_bits(np.array([0, 0, 1, 1]))
    4.0
    """
    counts = _counts(codes)
    return float((counts * np.log2(counts.sum() / counts)).sum()) if counts.size else 0.0


def coded_bits(codes: NDArray[np.integer]) -> float:
    """Return `entropy_bits` with a table of `SYMBOL_BITS` for each code that occurs.

    >>> coded_bits(np.array([0, 0, 1, 1]))
    20.0
    """
    return entropy_bits(codes) + SYMBOL_BITS * _counts(codes).size


def _counts(codes: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return how often each code that occurs does."""
    if not codes.size:
        return np.zeros(0)
    low, span = int(codes.min()), int(codes.max()) - int(codes.min())
    if span > MOST_COUNTED:
        return np.unique(codes, return_counts=True)[1].astype(np.float64)
    counts = np.bincount(codes.reshape(-1).astype(np.int64) - low)
    return counts[counts > 0].astype(np.float64)
