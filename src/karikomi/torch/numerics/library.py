"""Measure and apply with torch tensors: the measuring of `karikomi.torch`, and one pass to scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from karikomi.functional.library import Library
from karikomi.functional.norms import Axes
from karikomi.torch.numerics import norms
from karikomi.torch.numerics.namespace import DeviceNamespace
from karikomi.torch.numerics.orders import norm_of, norms_of, unit_norms_of

_LEAST = 1.2e-38  # factors below are no normal float32


class TorchNamespace(DeviceNamespace):
    """`karikomi.functional.library.MEASURE_OPERATIONS` on one device."""

    all = staticmethod(torch.all)
    concat = staticmethod(torch.cat)
    permute_dims = staticmethod(torch.permute)
    sign = staticmethod(torch.sign)

    @staticmethod
    def max(array: torch.Tensor, axis: Any = None) -> torch.Tensor:
        """Return the largest entries, NaN where there is one."""
        return torch.max(array) if axis is None else torch.amax(array, dim=axis)

    @staticmethod
    def sum(array: torch.Tensor, axis: Any = None) -> torch.Tensor:
        """Return the sum of all entries, or along some axes."""
        return torch.sum(array) if axis is None else torch.sum(array, dim=axis)


class TorchLibrary(Library):
    """Torch tensors on one device."""

    def __init__(self, device: torch.device) -> None:
        wide = norms.wide(device)
        super().__init__(
            TorchNamespace(device, wide),
            wide=wide,
            cond=_cond,
            itemsize=lambda dtype: dtype.itemsize,
        )

    def norm_vector(self, arrays: Sequence[torch.Tensor], order: float = 2.0) -> torch.Tensor:
        """Return the norms as one vector, without waiting for a device."""
        if all(norms.on_cpu(array) for array in arrays):
            return torch.from_numpy(norms_of(arrays, order))
        return torch.stack([norm_of(array, order) for array in arrays])

    def unit_norms(self, array: torch.Tensor, axes: Axes, order: float = 2.0) -> torch.Tensor:
        """Return one norm per output unit."""
        first, *others = axes
        if others:
            return super().unit_norms(array, axes, order)
        return self.widened(unit_norms_of(array, first, order))

    def peak(self, array: torch.Tensor) -> torch.Tensor:
        """Return the largest magnitude; NaN if any entry is."""
        return norms.peak(array)

    def scaled(self, arrays: Sequence[torch.Tensor], factors: torch.Tensor) -> list[torch.Tensor]:
        """Return arrays times a number of a vector each; one that is not changed is not copied."""
        if not norms.on_cpu(factors):
            return super().scaled(arrays, factors)
        return [
            self._by_number(array, factors[place], float(factors[place]))
            for place, array in enumerate(arrays)
        ]

    def _by_number(self, array: torch.Tensor, factor: torch.Tensor, number: float) -> torch.Tensor:
        if number == 1.0:
            return array
        if number == 0.0:
            return torch.zeros_like(array)
        return array * number if number >= _LEAST else self._times(array, factor)


def _cond(predicate: Any, first: Callable[[], list], other: Callable[[], list]) -> list:
    return first() if bool(predicate) else other()
