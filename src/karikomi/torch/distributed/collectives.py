"""Small vectors of host numbers joined over the ranks of process groups: sums, maxima, all of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

# A power of two: with it squares of norms from 3e-64 to 1e244 stay in float64's range, all of float32's
# among them. Larger ones count as infinite, smaller ones as zero.
_SHIFT = 2.0**-300


def reduced(
    groups: tuple[Any, ...],
    numbers: np.ndarray,
    present: np.ndarray,
    shares: np.ndarray,
    peaks: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return norms (largest magnitudes where `peaks`) and presence over all ranks of some groups.

    `shares`: 1 / how many ranks hold the same entries. A number that is not finite on a rank is not finite in the
    result. One reduction, and one more where there are peaks.
    """
    with np.errstate(over="ignore", under="ignore"):
        squares = np.where(peaks, 0.0, np.square(numbers * _SHIFT) * shares)
    sums = _all_reduced(groups, np.concatenate([squares, present]), "SUM")
    joint = np.sqrt(sums[: len(numbers)]) / _SHIFT
    if peaks.any():
        joint[peaks] = largest(groups, numbers[peaks])
    return joint, sums[len(numbers) :] > 0


def largest(groups: tuple[Any, ...], numbers: np.ndarray) -> np.ndarray:
    """Return the largest of each number over all ranks of some groups, infinite where one is NaN."""
    # A maximum may lose a NaN, never an infinity.
    return _all_reduced(groups, np.where(np.isnan(numbers), np.inf, numbers), "MAX")


def summed(groups: tuple[Any, ...], numbers: np.ndarray) -> np.ndarray:
    """Return numbers of any one type added up over all ranks of some groups; the input may be changed."""
    return _all_reduced(groups, numbers, "SUM")


def norm(numbers: np.ndarray) -> float:
    """Return the L2 norm of norms, safe against overflow; not finite if one of them is not."""
    largest = peak(numbers)
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * float(np.sqrt(np.sum(np.square(numbers / largest))))


def peak(numbers: np.ndarray) -> float:
    """Return the largest number, 0 of none; NaN if one of them is."""
    return float(np.max(numbers, initial=0.0))


def gathered(group: Any, numbers: np.ndarray) -> np.ndarray:
    """Return the numbers of every rank of a group, shape (ranks, numbers)."""
    tensor = torch.from_numpy(numbers).to(_device(group))
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, tensor, group=group)
    return torch.stack(every).cpu().numpy()


def _all_reduced(groups: tuple[Any, ...], numbers: np.ndarray, operation: str) -> np.ndarray:
    for group in groups:
        tensor = torch.from_numpy(numbers).to(_device(group))
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation), group=group)
        numbers = tensor.cpu().numpy()
    return numbers


def _device(group: Any) -> torch.device:
    """Return the device for reductions of a group: the host if possible, since the numbers are there."""
    kinds = [pair.partition(":")[0] for pair in str(dist.get_backend_config(group)).split(",")]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
