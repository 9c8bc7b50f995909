"""The array operations that rules decide with, on torch tensors of one device, without a host sync."""

from __future__ import annotations

from typing import Any

import torch

_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}


class DeviceNamespace:
    """`karikomi.rule.ARRAY_OPERATIONS` on one device, under their array-API names."""

    abs = staticmethod(torch.abs)
    any = staticmethod(torch.any)
    exp = staticmethod(torch.exp)
    floor = staticmethod(torch.floor)
    isfinite = staticmethod(torch.isfinite)
    log = staticmethod(torch.log)
    max = staticmethod(torch.max)
    sum = staticmethod(torch.sum)
    ones_like = staticmethod(torch.ones_like)
    zeros_like = staticmethod(torch.zeros_like)
    reshape = staticmethod(torch.reshape)
    sqrt = staticmethod(torch.sqrt)
    square = staticmethod(torch.square)
    where = staticmethod(torch.where)

    def __init__(self, device: torch.device, wide: torch.dtype) -> None:
        self._device, self._wide = device, wide

    def asarray(self, value: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a number as a 0-d tensor, an array by a copy that does not wait."""
        if isinstance(value, torch.Tensor):
            return value.to(self._device, dtype or value.dtype, non_blocking=True)
        if type(value) in _DTYPES:
            chosen = dtype or (self._wide if type(value) is float else _DTYPES[type(value)])
            return torch.full((), value, dtype=chosen, device=self._device)
        return torch.as_tensor(value, dtype=dtype).to(self._device, non_blocking=True)

    def arange(self, *bounds: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a range."""
        return torch.arange(*bounds, dtype=dtype, device=self._device)

    def zeros(self, shape: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return zeros."""
        return torch.zeros(shape, dtype=dtype or self._wide, device=self._device)

    def astype(self, array: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return an array in another dtype."""
        return array.to(dtype)

    def cumulative_sum(self, array: torch.Tensor, axis: int = 0) -> torch.Tensor:
        """Return the running sum along an axis."""
        return torch.cumsum(array, axis)

    def sort(self, array: torch.Tensor, axis: int = -1) -> torch.Tensor:
        """Return an array in ascending order along an axis."""
        return torch.sort(array, dim=axis).values

    def maximum(self, first: torch.Tensor, other: Any) -> torch.Tensor:
        """Return the larger of each pair."""
        return torch.maximum(first, self._tensor(other, first))

    def minimum(self, first: torch.Tensor, other: Any) -> torch.Tensor:
        """Return the smaller of each pair."""
        return torch.minimum(first, self._tensor(other, first))

    def _tensor(self, value: Any, like: torch.Tensor) -> torch.Tensor:
        return value if isinstance(value, torch.Tensor) else self.asarray(value, dtype=like.dtype)
