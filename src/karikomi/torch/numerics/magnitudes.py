"""The largest magnitudes of tensors on the CPU, in about the time of their 2-norms.

Without its sign the bits of a floating number are an integer that grows with its magnitude, those of NaN above all. So
the largest of the bits as signed integers is that of the positive entries, and as unsigned ones that of the negative.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from karikomi.torch.numerics.norms import flat, peak

_SMALL = 1_024  # how many entries a tensor has at most that is copied beside others
_TOGETHER = (
    16_384  # about how many entries are copied together: more are new pages of memory each time
)
_FEW = 24  # how many tensors are measured one by one, at most
_SEARCHED = 32_768  # up to how many entries two searches are faster than a maximum and a search
_CACHED = 393_216  # how many bytes are read a second time from the cache
_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def largest(tensors: Sequence[torch.Tensor]) -> np.ndarray:
    """Return the largest magnitude of each as float64; NaN if any entry is NaN, 0 of no entry."""
    least: list[float] = []
    most: list[float] = []
    places: list[int] = []
    small: list[torch.Tensor] = []
    sizes: list[int] = []
    single, dense = torch.float32, torch.strided
    copied = _SMALL if len(tensors) > _FEW else 0
    # Most tensors of most networks are small; these few calls are then the whole cost.
    for tensor in tensors:
        count = tensor.numel()
        plain = tensor.dtype is single and tensor.layout is dense and 0 < count <= _SEARCHED
        if not plain or tensor.requires_grad or tensor.is_neg():
            least.append(0.0)
            most.append(_of_row(row_of(tensor)))
        elif count > copied:
            entries = tensor.numpy()
            # The place of a NaN is that of the least and of the largest entry.
            least.append(entries.item(entries.argmin()))
            most.append(entries.item(entries.argmax()))
        else:
            places.append(len(most))
            small.append(tensor)
            sizes.append(count)
            least.append(0.0)
            most.append(0.0)
    found = np.abs(np.maximum(-np.array(least, np.float64), np.array(most, np.float64)))
    if small:
        found[places] = _of_small(small, sizes)
    return found


def row_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return real entries with the magnitudes of the stored ones as one row, without gradients."""
    # Few calls for the tensors that are most common.
    plain = tensor.dtype is torch.float32 and tensor.layout is torch.strided
    if plain and tensor.is_contiguous() and not tensor.requires_grad and not tensor.is_neg():
        return tensor if tensor.dim() == 1 else tensor.view(-1)
    return magnitudes_of(tensor)


def magnitudes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same for tensors of any kind."""
    stored = tensor.detach()
    if not stored.is_complex():
        return flat(stored).resolve_neg()
    if stored.layout is not torch.strided:
        stored = stored.coalesce().values() if stored.is_sparse else stored.values()
    return stored.abs().reshape(-1)


def _of_small(tensors: list[torch.Tensor], sizes: list[int]) -> np.ndarray:
    """Return the same of small tensors, from copies of many: calls would be the whole cost of each."""
    rows = [tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in tensors]
    stops = np.cumsum(sizes)
    starts = stops - sizes
    edges = [0, *(np.flatnonzero(np.diff(stops // _TOGETHER)) + 1).tolist(), len(rows)]
    found = []
    for first, last in itertools.pairwise(edges):
        signed = torch.cat(rows[first:last]).numpy().view(np.int32)
        begins = starts[first:last] - starts[first]
        negative = np.maximum.reduceat(signed.view(np.uint32), begins) & 0x7FFFFFFF
        found.append(np.maximum(np.maximum.reduceat(signed, begins), negative.view(np.int32)))
    return np.concatenate(found).view(np.float32)


def _of_row(row: torch.Tensor) -> float:
    if not row.numel() or row.dtype not in _FLOATING:
        return float(peak(row))
    if row.itemsize == 2:
        return _as_half(_largest_bits(row.view(torch.int16).numpy()), row.dtype)
    entries = row.numpy()
    bits = _largest_bits(entries.view(f"i{entries.itemsize}"))
    return float(np.array(bits, f"u{entries.itemsize}").view(entries.dtype))


def _largest_bits(signed: np.ndarray) -> int:
    """Return the bits of the largest magnitude, given bits as integers.

    Reads parts twice, the second time from the cache. A search takes fewer calls than a maximum, but waits for memory.
    """
    unsigned, part = signed.view(f"u{signed.itemsize}"), _CACHED // signed.itemsize
    maximum = np.maximum.reduce
    high, low = [], []
    for start in range(0, signed.size, part):
        high.append(maximum(signed[start : start + part]))
        again = unsigned[start : start + part]
        low.append(again.item(again.argmax()))
    magnitude = (1 << (8 * signed.itemsize - 1)) - 1
    return max(int(max(high)), max(low) & magnitude)


def _as_half(bits: int, dtype: torch.dtype) -> float:
    if dtype is torch.bfloat16:
        return float(np.array(bits << 16, np.uint32).view(np.float32))
    return float(np.array(bits, np.uint16).view(np.float16))
