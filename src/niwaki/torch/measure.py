"""Measure tensors: norms with float32 blocks and float64 across them, safe against overflow.

On the CPU a norm is a sum of BLAS dots over blocks of 16 Ki entries (one long float32 dot is 1e-3
off on constants); elsewhere it is one reduction with a float64 accumulator (float32 where the device
has no other) and no host sync: all numbers of a step come to the host in one transfer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

BLOCK = 16_384
UNIT_BLOCK = 1_024  # one reduction by rows is 2e-6 off on 4096 constants, 4e-7 on 1024: measured
TINY = 1e-15  # the norm below which float32 squares lose digits
HOST = "cpu"


def values(tensor: torch.Tensor) -> torch.Tensor:
    """Return the entries that are stored: of a sparse tensor its coalesced values, of a complex one both parts."""
    stored = tensor.detach()
    if stored.is_sparse:
        stored = stored.coalesce().values()
    elif stored.layout is not torch.strided:
        stored = stored.values()
    return torch.view_as_real(stored.resolve_conj()) if stored.is_complex() else stored


def norm(tensor: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm as a wide 0-d tensor on the tensor's device; non-finite if any entry is."""
    flat = values(tensor).reshape(-1)
    if flat.device.type != HOST:
        return _device_norm(flat)
    squares = 0.0
    for block in flat.split(BLOCK):
        wide = block if block.dtype in (torch.float32, torch.float64) else block.float()
        squares += float(torch.dot(wide, wide))
    # The float32 range ends at squares of 1e38 and begins to lose digits below 1e-30.
    if not math.isfinite(squares) or squares < TINY**2:
        return _scaled_norm(flat)
    return torch.tensor(math.sqrt(squares), dtype=torch.float64)


def peak(tensor: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude as a wide 0-d tensor; NaN if any entry is NaN."""
    flat = values(tensor).reshape(-1)
    if flat.numel() == 0:
        return torch.zeros((), dtype=wide(flat.device), device=flat.device)
    low, high = torch.aminmax(flat)
    return torch.maximum(-low, high).to(wide(flat.device))


def unit_norms(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """Return one wide L2 norm per index of `axis`, shape ``(tensor.shape[axis],)``."""
    units = tensor.detach().movedim(axis, 0)
    rows = units.reshape(units.shape[0], math.prod(units.shape[1:]))
    if rows.numel() == 0:
        return torch.zeros(rows.shape[0], dtype=wide(rows.device), device=rows.device)
    if rows.device.type != HOST:
        if rows.dtype is torch.float64 or wide(rows.device) is torch.float32:
            return _scaled_rows(rows)
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    norms = _blocked_rows(rows)
    again = ~torch.isfinite(norms) | (norms < TINY)
    if again.any():
        norms[again] = _scaled_rows(rows[again])
    return norms


def on_host(numbers: Sequence[torch.Tensor]) -> list[float]:
    """Return 0-d tensors as Python numbers, by one transfer for each device that holds some."""
    places: dict[torch.device, list[int]] = {}
    for place, number in enumerate(numbers):
        places.setdefault(number.device, []).append(place)
    found = [0.0] * len(numbers)
    for here in places.values():
        moved = torch.stack([numbers[place] for place in here]).cpu().tolist()
        for place, value in zip(here, moved, strict=True):
            found[place] = value
    return found


def wide(device: torch.device) -> torch.dtype:
    """Return the widest dtype that a device adds in: float64, on Apple's GPUs float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def _blocked_rows(rows: torch.Tensor) -> torch.Tensor:
    narrow = rows.dtype if rows.dtype in (torch.float32, torch.float64) else torch.float32
    squares = torch.zeros(rows.shape[0], dtype=torch.float64)
    for block in rows.split(UNIT_BLOCK, dim=1):
        # A strided reduction is an order of magnitude slower than the copy.
        block = block if block.stride(1) == 1 else block.contiguous()
        squares += torch.linalg.vector_norm(block, dim=1, dtype=narrow).double().square()
    return squares.sqrt()


def _scaled_rows(rows: torch.Tensor) -> torch.Tensor:
    dtype = wide(rows.device)
    largest = rows.abs().amax(dim=1, keepdim=True).to(dtype)
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return (torch.linalg.vector_norm(rows.to(dtype) / scale, dim=1, keepdim=True) * scale)[:, 0]


def _device_norm(flat: torch.Tensor) -> torch.Tensor:
    if flat.dtype is torch.float64 or wide(flat.device) is torch.float32:
        return _scaled_norm(flat)
    return torch.linalg.vector_norm(flat, dtype=torch.float64)


def _scaled_norm(flat: torch.Tensor) -> torch.Tensor:
    largest = peak(flat)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, torch.ones_like(largest))
    total = torch.zeros((), dtype=wide(flat.device), device=flat.device)
    for block in flat.split(BLOCK):
        total += torch.linalg.vector_norm(block.to(total.dtype) / scale).square()
    return torch.sqrt(total) * scale
