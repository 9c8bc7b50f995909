"""Norms of any order of tensors: the Euclidean ones of `norms`, and p-norms for p >= 1, up to largest magnitudes.

On the CPU powers are summed in float32 blocks and float64 across them (4e-6 off on constants at most), again with
the entries divided by the largest where float32 may have lost digits. Elsewhere one reduction with a float64
accumulator, without a host sync.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from karikomi.torch.internals import norms_at_once
from karikomi.torch.numerics import norms
from karikomi.torch.numerics.magnitudes import largest, magnitudes_of, row_of
from karikomi.torch.numerics.norms import BLOCK, SCALED, on_cpu, on_host, peak, wide

_HIGHEST = 8.0  # powers of float32 entries above it overflow float64
_LOST = 1e-31  # sums of powers below it per entry may have lost digits to float32's underflow
Sum = Callable[[np.ndarray], float]
Axis = int | tuple[int, ...]
"""The axis whose index is one unit, or the axes whose indices together name one, in ascending order."""


def norms_of(tensors: Sequence[torch.Tensor], order: float = 2.0) -> np.ndarray:
    """Return the norms of this order as NumPy numbers, by one transfer for each device that holds some."""
    if order == 2.0:
        return norms.norms(tensors)
    if all(map(on_cpu, tensors)):
        return np.array(_on_cpu(tensors, order), dtype=np.float64)
    return np.array(on_host([norm_of(tensor, order) for tensor in tensors]), dtype=np.float64)


def norm_of(tensor: torch.Tensor, order: float = 2.0) -> torch.Tensor:
    """Return the norm as a wide 0-d tensor on the tensor's device; non-finite if any entry is."""
    if order == 2.0:
        return norms.norm(tensor)
    if on_cpu(tensor):
        return torch.tensor(_on_cpu([tensor], order)[0], dtype=torch.float64)
    entries = magnitudes_of(tensor)
    if math.isinf(order) or entries.numel() == 0:
        return peak(entries)
    if order == 1.0 or not _may_overflow(entries, order):
        return torch.linalg.vector_norm(entries, order, dtype=wide(entries.device))
    return _scaled(entries, order)


def at_once(
    tensors: Sequence[torch.Tensor], dtype: torch.dtype, order: float = 2.0
) -> Sequence[torch.Tensor]:
    """Return the norms of dense tensors of one device, in one kernel where none can overflow."""
    if order == 2.0 or not any(_may_overflow(t, order) or t.numel() == 0 for t in tensors):
        return norms_at_once(tensors, dtype, order)
    return [norm_of(tensor, order) for tensor in tensors]


def unit_norms_of(tensor: torch.Tensor, axis: Axis, order: float = 2.0) -> torch.Tensor:
    """Return one wide norm per index of `axis`, shape (units,)."""
    if not isinstance(axis, int):
        tensor = tensor.detach().movedim(axis, tuple(range(len(axis)))).flatten(0, len(axis) - 1)
        axis = 0
    if order == 2.0:
        return norms.unit_norms(tensor, axis)
    units = tensor.detach().movedim(axis, 0)
    rows = units.reshape(units.shape[0], math.prod(units.shape[1:]))
    rows = rows.abs() if rows.is_complex() else rows
    if rows.numel() == 0:
        return torch.zeros(rows.shape[0], dtype=wide(rows.device), device=rows.device)
    together = max(1, SCALED // rows.shape[1])
    return torch.cat([_row_norms(part, order) for part in rows.split(together)])


def _row_norms(rows: torch.Tensor, order: float) -> torch.Tensor:
    dtype = wide(rows.device)
    largest = rows.abs().amax(dim=1).to(dtype)
    if math.isinf(order):
        return largest
    usable = (largest > 0) & torch.isfinite(largest)
    scale = torch.where(usable, largest, torch.ones_like(largest))
    return torch.linalg.vector_norm(rows.to(dtype) / scale[:, None], order, dim=1) * scale


def _on_cpu(tensors: Sequence[torch.Tensor], order: float) -> list[float] | np.ndarray:
    """Return the norms of tensors on the CPU."""
    if math.isinf(order):
        return largest(tensors)
    if order == 1.0:
        return _sums_of_magnitudes(tensors)
    powers = _powers(order)
    with np.errstate(over="ignore", under="ignore"):
        return [_power_norm(row_of(tensor), order, powers) for tensor in tensors]


def _sums_of_magnitudes(tensors: Sequence[torch.Tensor]) -> list[float]:
    single = _asum(4)
    found = []
    for tensor in tensors:
        row = row_of(tensor)
        if row.dtype is torch.float32 and 0 < row.numel() <= BLOCK:
            found.append(single(row.numpy()))
        else:
            found.append(_summed(row, _sum_of_magnitudes))
    return found


def _summed(entries: torch.Tensor, of_block: Sum) -> float:
    """Return the sum over blocks of what `of_block` returns of each, half precision made float32."""
    if entries.itemsize < 4:
        halves = entries.split(norms.WIDENED)
        return sum(_over_blocks(half.float().numpy(), of_block) for half in halves)
    return _over_blocks(entries.numpy(), of_block)


def _over_blocks(row: np.ndarray, of_block: Sum) -> float:
    if row.size <= BLOCK:
        return of_block(row)
    starts = range(0, row.size, BLOCK)
    return sum(of_block(row[start : start + BLOCK]) for start in starts)


def _sum_of_magnitudes(block: np.ndarray) -> float:
    return _asum(block.itemsize)(block) if block.size else 0.0


@functools.cache
def _asum(itemsize: int) -> Callable[[np.ndarray], float]:
    # Loaded where it is needed: most clips are by other norms.
    blas: Any = importlib.import_module("scipy.linalg.blas")
    return blas.sasum if itemsize == 4 else blas.dasum


def _aligned(count: int, kind: type) -> np.ndarray:
    """Return room for numbers at a multiple of 64 bytes: elsewhere a dot product differs in its last digits."""
    size = count * np.dtype(kind).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(kind)


def _powers(order: float) -> Sum:
    """Return the function that sums the powers of the magnitudes in a block."""
    if order not in (3.0, 4.0):
        return lambda block: float(np.sum(np.abs(block) ** order))
    buffers = {kind: _aligned(BLOCK, kind) for kind in (np.float32, np.float64)}

    def summed(block: np.ndarray) -> float:
        products = buffers[block.dtype.type][: block.size]
        np.multiply(block, block, out=products)
        if order == 4.0:
            return float(np.dot(products, products))
        np.multiply(products, block, out=products)
        return _sum_of_magnitudes(products)

    return summed


def _power_norm(entries: torch.Tensor, order: float, powers: Sum) -> float:
    count = entries.numel()
    total = _summed(entries, powers)
    low = 1e-250 if entries.dtype is torch.float64 else _LOST * count
    if low < total < math.inf:
        return total ** (1.0 / order)
    return float(_scaled(entries, order)) if count else 0.0


def _scaled(entries: torch.Tensor, order: float) -> torch.Tensor:
    """Return the norm of entries divided by the largest one, which no power can overflow."""
    largest = peak(entries)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, torch.ones_like(largest))
    total = torch.zeros((), dtype=scale.dtype, device=entries.device)
    for block in entries.split(SCALED):
        total += (block.to(scale.dtype) / scale).abs().pow(order).sum()
    return total.pow(1.0 / order) * scale


def _may_overflow(tensor: torch.Tensor, order: float) -> bool:
    if math.isinf(order) or order == 1.0:
        return False
    return tensor.dtype is torch.float64 or order > _HIGHEST or wide(tensor.device) is torch.float32
