"""The largest singular value of a weight, followed from step to step by block power iteration.

A block of eight vectors is kept for each weight. The first call iterates until the estimate
converges; later steps start from the kept block and need one or two iterations, each a product
with the matrix and one with its transpose. Measured on an MLP under Adam from its first step, where
weights move by half, the estimate is at most 2e-4 below the true value, where one vector and one
iteration are 8e-2 below.
"""

from __future__ import annotations

import math
import zlib

import torch

from karikomi.errors import InvalidArgument
from karikomi.torch.numerics.norms import TINY, peak

BLOCK = 8  # a matrix with no more rows or columns is exact at once
FIRST = (100, 1e-7)  # most iterations, and the relative growth of the estimate that ends them
LATER = (20, 1e-4)


def spectral_norm(
    tensor: torch.Tensor, axis: int, block: torch.Tensor | None, *, name: str
) -> tuple[float, torch.Tensor]:
    """Return ``(the largest singular value, block)`` of the matrix (units, all the rest).

    `axis`: of the units. `block`: the block that the last call returned for this tensor, ``None`` at first; it
    is drawn from a seed that depends on `name` and shape alone, and never written to. The estimate is
    never above the true value except for rounding. NaN or infinite if an entry is.
    """
    matrix = _matrix(tensor, axis)
    shape = (matrix.shape[1], min(BLOCK, *matrix.shape))
    if block is not None:
        if block.shape != shape:
            raise InvalidArgument(
                "these vectors are of another tensor",
                where=f"vectors: {name}",
                got=tuple(block.shape),
                allowed=shape,
            )
        size, after = _iterated(matrix, block.to(matrix), *LATER)
        if TINY < size < math.inf:
            return size, after
    largest = float(peak(matrix))
    fresh = _fresh(name, shape).to(matrix)
    if largest == 0.0 or not math.isfinite(largest):
        return largest, fresh
    if TINY < largest < 1.0 / TINY:
        return _iterated(matrix, fresh, *FIRST)
    size, after = _iterated(matrix.double() / largest, fresh.double(), *FIRST)
    return size * largest, after.to(matrix)


def _matrix(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    units = tensor.detach().movedim(axis, 0)
    matrix = units.reshape(units.shape[0], math.prod(units.shape[1:]))
    return matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()


def _fresh(name: str, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {shape}".encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _iterated(
    matrix: torch.Tensor, block: torch.Tensor, most: int, close: float
) -> tuple[float, torch.Tensor]:
    best = 0.0
    for turn in range(most):
        block = torch.linalg.qr(block)[0]
        image = matrix @ block
        if not math.isfinite(float(peak(image))):
            return math.inf, block
        size, best = best, float(torch.linalg.svdvals(image)[0]) if image.numel() else 0.0
        if best - size <= close * best or turn == most - 1:
            break
        block = matrix.mT @ image
    return best, block
