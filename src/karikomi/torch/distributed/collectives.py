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
    order: float = 2.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return norms (largest magnitudes where `peaks`) and presence over all ranks of some groups.

    `shares`: 1 / how many ranks hold the same entries. `order`: the p of the norms. A number that is not finite on a
    rank is not finite in the result. One reduction, and one more where there are peaks or p is neither 1 nor 2.
    """
    peaks = peaks | math.isinf(order)
    scale = np.full(len(numbers), 1.0 / _SHIFT if order == 2.0 else 1.0)
    if peaks.any() or order not in (1.0, 2.0):
        most = largest(groups, numbers.copy())
        usable = np.isfinite(most) & (most > 0)
        scale = scale if order in (1.0, 2.0) else np.where(usable, most, 1.0)
    else:
        most = numbers
    # An infinite order has maxima only.
    power = 1.0 if math.isinf(order) else order
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        powers = np.where(peaks, 0.0, (numbers / scale) ** power * shares)
    sums = _all_reduced(groups, np.concatenate([powers, present]), "SUM")
    joint = sums[: len(numbers)]
    joint = (np.sqrt(joint) if power == 2.0 else joint ** (1.0 / power)) * scale
    return np.where(peaks, most, joint), sums[len(numbers) :] > 0


def largest(groups: tuple[Any, ...], numbers: np.ndarray) -> np.ndarray:
    """Return the largest of each number over all ranks of some groups, infinite where one is NaN."""
    # A maximum may lose a NaN, never an infinity.
    return _all_reduced(groups, np.where(np.isnan(numbers), np.inf, numbers), "MAX")


def summed(groups: tuple[Any, ...], numbers: np.ndarray) -> np.ndarray:
    """Return numbers of any one type added up over all ranks of some groups; the input may be changed."""
    return _all_reduced(groups, numbers, "SUM")


def norm(numbers: np.ndarray, order: float = 2.0) -> float:
    """Return the norm of norms of the same order, safe against overflow; not finite if one of them is not."""
    largest = peak(numbers)
    if largest == 0.0 or not math.isfinite(largest) or math.isinf(order):
        return largest
    ratios = numbers / largest
    if order == 2.0:
        return largest * float(np.sqrt(np.sum(np.square(ratios))))
    return largest * float(np.sum(ratios**order)) ** (1.0 / order)


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
