"""Measure tensors: norms with float32 blocks and float64 across them, safe against overflow.

On the CPU a norm is one pass: a BLAS dot for small tensors, for large ones norms of rows of 2,048
entries (2e-9 off on noise, at most 1.9e-6 on constants, where one long float32 dot is off by 1e-3). Elsewhere one
reduction with a float64 accumulator (float32 where the device has no other) and no host sync: all
numbers of a step come to the host in one transfer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import numpy as np
import torch

from karikomi.torch.internals import norms_at_once

BLOCK = 32_768  # the most entries of one float32 dot: at most 1.9e-6 off, on constants
ROW = 2_048  # the same of one row of a reduction by rows; half of it is half as far off, and slower
WIDENED = 262_144  # how many half-precision entries are made float32 at a time
SCALED = 4_194_304  # how many entries are divided by the largest at a time
TINY = 1e-15  # the norm below which float32 squares lose digits


on_cpu = operator.attrgetter("is_cpu")
"""Whether a tensor is on the CPU; called very often, hence not a Python function."""


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
    if not on_cpu(tensor):
        return _device_norm(values(tensor).reshape(-1))
    squares = _squares(flat(tensor))
    # The float32 range ends at squares of 1e38 and begins to lose digits below 1e-30.
    good = TINY**2 <= squares < math.inf
    size = math.sqrt(squares) if good else float(_scaled_norm(values(tensor).reshape(-1)))
    return torch.tensor(size, dtype=torch.float64)


def norms(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """Return the L2 norms as NumPy numbers, by one transfer for each device that holds some."""
    squares: list[float] = []
    large = _Large()
    # Most tensors of most networks are small; these few calls are then the whole cost.
    for tensor in tensors:
        square = math.nan
        plain = tensor.dtype is torch.float32 and tensor.layout is torch.strided
        if plain and on_cpu(tensor) and tensor.is_contiguous():
            row = tensor if tensor.dim() == 1 else tensor.view(-1)
            if row.numel() <= BLOCK:
                square = row.dot(row).item()
            else:
                large.add(len(squares), row)
        squares.append(square)
    found = np.array(squares, dtype=np.float64)
    large.fill(found)
    good = (found >= TINY**2) & (found < math.inf)
    np.sqrt(found, out=found, where=good)
    if not good.all():
        rest = np.flatnonzero(~good).tolist()
        found[rest] = on_host(_device_norms([tensors[place] for place in rest]))
    return found


def _device_norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the norms as 0-d tensors on the devices of the tensors, one call for each device."""
    found: dict[int, torch.Tensor] = {}
    together: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        plain = tensor.layout is torch.strided and not tensor.is_complex() and tensor.numel()
        narrow = tensor.dtype is torch.float64 or wide(tensor.device) is torch.float32
        if on_cpu(tensor) or narrow or not plain:
            found[place] = norm(tensor)
        else:
            together.setdefault(tensor.device, []).append(place)
    for places in together.values():
        dense = [tensors[place].detach() for place in places]
        sizes = norms_at_once(dense, torch.float64)
        found |= dict(zip(places, sizes, strict=True))
    return [found[place] for place in range(len(tensors))]


class _Large:
    """Sums of squares of many large tensors, by rows, whose norms are squared and added together."""

    def __init__(self) -> None:
        self._places: list[int] = []
        self._rows: list[torch.Tensor] = []
        self._rest: list[float] = []

    def add(self, place: int, entries: torch.Tensor) -> None:
        count = entries.numel() // ROW
        body = entries
        rest = 0.0
        if count * ROW != entries.numel():
            body, tail = entries[: count * ROW], entries[count * ROW :]
            rest = float(torch.dot(tail, tail))
        self._places.append(place)
        self._rows.append(torch.linalg.vector_norm(body.view(count, ROW), dim=1))
        self._rest.append(rest)

    def fill(self, found: np.ndarray) -> None:
        """Write the sums at their places."""
        if self._rows:
            every = torch.cat(self._rows).double().square_().numpy()
            starts = np.cumsum([0, *(len(rows) for rows in self._rows[:-1])])
            found[self._places] = np.add.reduceat(every, starts) + self._rest


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the stored entries as one row, without a copy where they are dense in memory in any order."""
    if tensor.layout is not torch.strided or tensor.is_complex():
        return values(tensor).reshape(-1)
    if tensor.is_contiguous():
        return tensor if tensor.dim() == 1 else tensor.view(-1)
    strides = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, size in strides:
        if size != 1 and stride != expected:
            return tensor.reshape(-1)
        expected *= size
    return tensor.as_strided((tensor.numel(),), (1,))


def peak(tensor: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude as a wide 0-d tensor; NaN if any entry is NaN."""
    entries = flat(tensor)
    if entries.numel() == 0:
        return torch.zeros((), dtype=wide(entries.device), device=entries.device)
    low, high = torch.aminmax(entries)
    return torch.maximum(-low, high).abs_().to(wide(entries.device))


def unit_norms(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """Return one wide L2 norm per index of `axis`, shape ``(tensor.shape[axis],)``."""
    units = tensor.detach().movedim(axis, 0)
    rows = units.reshape(units.shape[0], math.prod(units.shape[1:]))
    if rows.numel() == 0:
        return torch.zeros(rows.shape[0], dtype=wide(rows.device), device=rows.device)
    if not on_cpu(rows):
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
    """Return the widest dtype of a device for sums: float64, on Apple's GPUs float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def _squares(entries: torch.Tensor) -> float:
    count = entries.numel()
    if entries.dtype is torch.float32:
        if count <= BLOCK:
            return float(torch.dot(entries, entries))
        large, found = _Large(), np.zeros(1)
        large.add(0, entries)
        large.fill(found)
        return float(found[0])
    if entries.dtype is torch.float64:
        return float(torch.dot(entries, entries))
    return math.fsum(_squares(block.float()) for block in entries.split(WIDENED))


def _blocked_rows(rows: torch.Tensor) -> torch.Tensor:
    narrow = rows.dtype if rows.dtype in (torch.float32, torch.float64) else torch.float32
    squares = torch.zeros(rows.shape[0], dtype=torch.float64)
    for block in rows.split(ROW, dim=1):
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
    for block in flat.split(SCALED):
        total += torch.linalg.vector_norm(block.to(total.dtype) / scale).square()
    return torch.sqrt(total) * scale
