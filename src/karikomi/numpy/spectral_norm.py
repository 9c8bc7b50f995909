"""The largest singular value of an array, followed from step to step by block power iteration.

The readable reference: a block of eight vectors is kept; the first call iterates until
the estimate converges, later steps need one or two iterations from the kept block.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

from karikomi.errors import check
from karikomi.numpy.norms import peak

BLOCK = 8  # a matrix with no more rows or columns is exact at once
FIRST = (100, 1e-7)  # most iterations, and the relative growth of the estimate that ends them
LATER = (20, 1e-4)


def spectral_norm(
    array: np.ndarray, axis: int, block: np.ndarray | None, *, name: str
) -> tuple[float, np.ndarray]:
    """Return ``(the largest singular value, block)`` of the matrix (units, all the rest).

    `block`: what the last call returned for this array, ``None`` at first; it is begun from a seed
    that depends on `name` and shape alone. The estimate is never above the true value.
    """
    units = np.moveaxis(array, axis, 0)
    matrix = units.reshape(units.shape[0], math.prod(units.shape[1:]))
    shape = (matrix.shape[1], min(BLOCK, *matrix.shape))
    got = shape if block is None else block.shape
    check(f"vectors: {name}", (got == shape, "these vectors are of another array", got, shape))
    fresh = np.random.default_rng([zlib.crc32(name.encode()), *shape]).standard_normal(shape)
    largest = peak(matrix)
    if largest == 0.0 or not math.isfinite(largest):
        return largest, fresh
    matrix = matrix.astype(np.float64) / largest
    if block is not None:
        size, after = _iterated(matrix, block, *LATER)
        if size > 0.0:
            return size * largest, after
    size, after = _iterated(matrix, fresh, *FIRST)
    return size * largest, after


def _iterated(
    matrix: np.ndarray, block: np.ndarray, most: int, close: float
) -> tuple[float, np.ndarray]:
    best = 0.0
    for turn in range(most):
        block = np.linalg.qr(block)[0]
        image = matrix @ block
        size, best = best, float(np.linalg.svd(image, compute_uv=False)[0])
        if best - size <= close * best or turn == most - 1:
            break
        block = matrix.T @ image
    return best, block
