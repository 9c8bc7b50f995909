"""The largest singular value of an array, followed by power iteration from a vector that is kept.

The readable reference: the first sight of a tensor converges on a small block of vectors, every
later one takes a single iteration.
"""

from __future__ import annotations

import zlib

import numpy as np

from niwaki.numpy.measure import peak

BLOCK = 8  # vectors of the start: a matrix with no more rows or columns is exact at once
MOST = 100  # iterations of the start
CLOSE = 1e-7  # relative growth of the estimate below which the start has converged


def spectral_norm(
    array: np.ndarray, axis: int, vector: np.ndarray | None, *, name: str
) -> tuple[float, np.ndarray]:
    """Return ``(the largest singular value, its right vector)`` of the matrix (units, all the rest).

    `vector`: what the last call returned for this tensor, ``None`` at first; it is begun anew from a
    seed that depends on `name` and shape alone. The estimate is never above the true value.
    """
    units = np.moveaxis(array, axis, 0)
    matrix = units.reshape(units.shape[0], -1) if array.size else np.zeros((1, 1))
    largest = peak(matrix)
    if largest == 0.0 or not np.isfinite(largest):
        return largest, np.ones(matrix.shape[1]) / np.sqrt(matrix.shape[1])
    matrix = matrix.astype(np.float64) / largest
    image = None if vector is None else matrix @ vector
    if image is None or not image.any():
        size, vector = _converged(matrix, name)
    else:
        back = matrix.T @ image
        size, vector = np.linalg.norm(back) / np.linalg.norm(image), back / np.linalg.norm(back)
    return float(size) * largest, vector


def _converged(matrix: np.ndarray, name: str) -> tuple[float, np.ndarray]:
    generator = np.random.default_rng([zlib.crc32(name.encode()), *matrix.shape])
    block = generator.standard_normal((matrix.shape[1], min(BLOCK, *matrix.shape)))
    size = 0.0
    for _ in range(MOST):
        block = np.linalg.qr(block)[0]
        image = matrix @ block
        _, sizes, right = np.linalg.svd(image, full_matrices=False)
        best, vector = float(sizes[0]), block @ right[0]
        if best - size <= CLOSE * best:
            break
        size, block = best, matrix.T @ image
    return best, vector
