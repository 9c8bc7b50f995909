"""Apply to torch tensors in place: scale, clamp, unit by unit, and the limit as a dtype rounds it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import numpy as np
import torch

from karikomi.torch.distributed.dtensors import local

_FLUSHED = 1e-30  # a float32 kernel flushes smaller factors


def representable(limit: float, tensor: torch.Tensor) -> float:
    """Return a limit as the tensor's dtype rounds it: what stands there is not above it."""
    return _rounded(limit, tensor.dtype)


@functools.lru_cache(maxsize=1024)
def _rounded(limit: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(limit, dtype=torch.float64).to(dtype))


def multiply_(tensor: torch.Tensor, factor: float) -> None:
    """Multiply in place by a factor >= 0; zero writes zeros even over NaN."""
    if factor == 0.0:
        tensor.zero_()
    elif factor < _FLUSHED:
        # Its root twice keeps the digits.
        root = math.sqrt(factor)
        tensor.mul_(root).mul_(root)
    else:
        tensor.mul_(factor)


def scale_(parameter: torch.Tensor, factor: float) -> None:
    """Multiply a gradient, dense, sparse or sharded."""
    multiply_(entries(parameter), factor)


def scale_all_(parameters: Iterable[torch.Tensor], factor: float) -> None:
    """Multiply all gradients by one factor."""
    tensors = [entries(parameter) for parameter in parameters if parameter.grad is not None]
    # On the CPU the function for many rounds the factor to half precision, and a small one to zero.
    if factor < _FLUSHED or any(tensor.is_cpu and tensor.itemsize < 4 for tensor in tensors):
        for tensor in tensors:
            multiply_(tensor, factor)
    else:
        torch._foreach_mul_(tensors, factor)  # pyright: ignore[reportPrivateImportUsage]


def scale_one_(tensor: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply by a number on the tensor's device, in float32 or wider: a half would round the number."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    tensor.mul_(factor.to(wide).reshape([1] * tensor.dim()))


def scale_units_(parameter: torch.Tensor, axis: int, factors: np.ndarray | torch.Tensor) -> None:
    """Multiply the units of a gradient along an axis; units with factor 1 keep their bits."""
    gradient = parameter.grad
    assert gradient is not None  # noqa: S101  (the caller has looked)
    tensor = local(gradient)
    if rows_of_sparse(tensor, axis):
        tensor = entries(parameter)
        assert parameter.grad is not None  # noqa: S101  (it was there)
        rows = parameter.grad._indices()[0]
        factors = factors[rows.cpu().numpy() if isinstance(factors, np.ndarray) else rows]
    elif tensor.layout is not torch.strided:
        parameter.grad = tensor = tensor.to_dense()
    shape = [1] * tensor.dim()
    shape[axis] = -1
    wide = torch.promote_types(
        tensor.real.dtype if tensor.is_complex() else tensor.dtype, torch.float32
    )
    if isinstance(factors, np.ndarray) and factors.min() < _FLUSHED:
        wide = torch.float64
    tensor.mul_(torch.as_tensor(factors, device=tensor.device).to(wide).reshape(shape))


def clamp_(
    parameter: torch.Tensor, limit: float | torch.Tensor, moments: torch.Tensor | None = None
) -> None:
    """Clamp the entries of a gradient to +-limit, or to +-limit * sqrt(moments) where these are not 0."""
    tensor = entries(parameter)
    gradient = parameter.grad
    if moments is None:
        tensor.clamp_(-limit, limit)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return
    assert gradient is not None  # noqa: S101  (the caller has looked)
    if rows_of_sparse(gradient, 0):
        moments = moments[gradient._indices()[0]]
    elif gradient.layout is not torch.strided:
        parameter.grad = tensor = gradient.to_dense()
    most = moments.to(torch.promote_types(moments.dtype, torch.float32)).sqrt().mul_(limit)
    bounded = torch.minimum(torch.maximum(tensor.to(most.dtype), -most), most).to(tensor.dtype)
    tensor.copy_(torch.where(most > 0, bounded, tensor))


def rows_of_sparse(gradient: torch.Tensor, axis: int) -> bool:
    """Return whether a gradient is stored as some of its rows, and its units are the rows."""
    return gradient.layout is torch.sparse_coo and gradient.sparse_dim() == 1 and axis == 0


def entries(parameter: torch.Tensor) -> torch.Tensor:
    """Return the entries of a gradient that arithmetic in place acts on: of a sparse one the stored ones."""
    gradient = parameter.grad
    assert gradient is not None  # noqa: S101  (the caller has looked)
    gradient = local(gradient)
    if gradient.layout is torch.strided:
        if gradient.is_contiguous() or 0 not in gradient.stride():
            return gradient
        # Several of its entries are one number in memory.
        parameter.grad = gradient = gradient.clone(memory_format=torch.contiguous_format)
        return gradient
    # A row that occurs twice in a sparse gradient is clipped by its sum, which is what the step applies.
    if gradient.layout is torch.sparse_coo and not gradient.is_coalesced():
        parameter.grad = gradient = gradient.coalesce()
    return gradient._values() if gradient.layout is torch.sparse_coo else gradient.values()
