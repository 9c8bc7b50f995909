"""Measure tensors: norms with float32 blocks and float64 across them, safe against overflow.

On the CPU a norm is a sum of BLAS dots over blocks of 16 Ki entries (one long float32 dot is 1e-3
off on constants); elsewhere it is one reduction with a float64 accumulator and no host sync.
"""

from __future__ import annotations

import math

import torch

BLOCK = 16_384


def values(tensor: torch.Tensor) -> torch.Tensor:
    """Return the entries that are stored: of a sparse tensor its coalesced values, of a complex one both parts."""
    stored = tensor.detach()
    if stored.is_sparse:
        stored = stored.coalesce().values()
    elif stored.layout is not torch.strided:
        stored = stored.values()
    return torch.view_as_real(stored.resolve_conj()) if stored.is_complex() else stored


def norm(tensor: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm as a float64 0-d tensor on the tensor's device; non-finite if any entry is."""
    flat = values(tensor).reshape(-1)
    if flat.device.type != "cpu":
        return _device_norm(flat)
    squares = 0.0
    for block in flat.split(BLOCK):
        wide = block if block.dtype in (torch.float32, torch.float64) else block.float()
        squares += float(torch.dot(wide, wide))
    # The float32 range ends at squares of 1e38 and begins to lose digits below 1e-30.
    if not math.isfinite(squares) or squares < 1e-30:
        return _scaled_norm(flat)
    return torch.tensor(math.sqrt(squares), dtype=torch.float64)


def peak(tensor: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude as a float64 0-d tensor; NaN if any entry is NaN."""
    flat = values(tensor).reshape(-1)
    if flat.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=flat.device)
    low, high = torch.aminmax(flat)
    return torch.maximum(-low, high).double()


def unit_norms(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """Return one float64 L2 norm per index of `axis`, shape ``(tensor.shape[axis],)``."""
    units = tensor.detach().movedim(axis, 0)
    rows = units.reshape(units.shape[0], math.prod(units.shape[1:]))
    if rows.numel() == 0:
        return torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    largest = rows.abs().amax(dim=1, keepdim=True).double()
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return (torch.linalg.vector_norm(rows.double() / scale, dim=1, keepdim=True) * scale).squeeze(1)


def _device_norm(flat: torch.Tensor) -> torch.Tensor:
    if flat.dtype is torch.float64:
        return _scaled_norm(flat)
    return torch.linalg.vector_norm(flat, dtype=torch.float64)


def _scaled_norm(flat: torch.Tensor) -> torch.Tensor:
    largest = peak(flat)
    scale = torch.where((largest > 0) & torch.isfinite(largest), largest, torch.ones_like(largest))
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for block in flat.split(BLOCK):
        total += torch.linalg.vector_norm(block.double() / scale).square()
    return torch.sqrt(total) * scale
