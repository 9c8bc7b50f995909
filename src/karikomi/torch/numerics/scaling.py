"""Scale and clamp torch tensors in place, whole or unit by unit, and round limits to dtypes.

The functions on gradients return the gradient that holds the result: another tensor where the entries of
the given one cannot be written in place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import numpy as np
import torch

from karikomi.torch.distributed.dtensors import local
from karikomi.torch.internals import multiply_all_

_FLUSHED = 1e-30  # a float32 kernel flushes smaller factors


def representable(limit: float, tensor: torch.Tensor) -> float:
    """Return a limit rounded to the dtype of a tensor, so that clamped entries are not above it."""
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


def scale_(gradient: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply a gradient, dense, sparse or sharded."""
    gradient = writable(gradient)
    multiply_(_stored(gradient), factor)
    return gradient


def scale_all_(gradients: Iterable[torch.Tensor], factor: float) -> list[torch.Tensor]:
    """Multiply all gradients by one factor."""
    gradients = [writable(gradient) for gradient in gradients]
    tensors = [_stored(gradient) for gradient in gradients]
    # On the CPU the function for many rounds the factor to half precision, and a small one to zero.
    if factor < _FLUSHED or any(tensor.is_cpu and tensor.itemsize < 4 for tensor in tensors):
        for tensor in tensors:
            multiply_(tensor, factor)
    else:
        multiply_all_(tensors, factor)
    return gradients


def scale_one_(tensor: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply by a number on the tensor's device, in float32 or wider: a half would round the number."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    tensor.mul_(factor.to(wide).reshape([1] * tensor.dim()))


def scale_units_(
    gradient: torch.Tensor, axis: int, factors: np.ndarray | torch.Tensor
) -> torch.Tensor:
    """Multiply the units of a gradient along an axis; units with factor 1 keep their bits."""
    tensor = local(gradient)
    if rows_of_sparse(tensor, axis):
        gradient = writable(gradient)
        tensor = _stored(gradient)
        rows = gradient.indices()[0]
        factors = factors[rows.cpu().numpy() if isinstance(factors, np.ndarray) else rows]
    elif tensor.layout is not torch.strided:
        gradient = tensor = tensor.to_dense()
    shape = [1] * tensor.dim()
    shape[axis] = -1
    wide = torch.promote_types(
        tensor.real.dtype if tensor.is_complex() else tensor.dtype, torch.float32
    )
    if isinstance(factors, np.ndarray) and factors.min() < _FLUSHED:
        wide = torch.float64
    tensor.mul_(torch.as_tensor(factors, device=tensor.device).to(wide).reshape(shape))
    return gradient


def clamp_(
    gradient: torch.Tensor, limit: float | torch.Tensor, moments: torch.Tensor | None = None
) -> torch.Tensor:
    """Clamp the entries of a gradient to +-limit, or to +-limit * sqrt(moments) where these are not 0."""
    gradient = writable(gradient)
    tensor = _stored(gradient)
    if moments is None:
        tensor.clamp_(-limit, limit)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return gradient
    if rows_of_sparse(gradient, 0):
        moments = moments[gradient.indices()[0]]
    elif gradient.layout is not torch.strided:
        gradient = tensor = gradient.to_dense()
    most = moments.to(torch.promote_types(moments.dtype, torch.float32)).sqrt().mul_(limit)
    bounded = torch.minimum(torch.maximum(tensor.to(most.dtype), -most), most).to(tensor.dtype)
    tensor.copy_(torch.where(most > 0, bounded, tensor))
    return gradient


def finite_(gradient: torch.Tensor) -> torch.Tensor:
    """Set the entries of a gradient that are not finite to zero."""
    gradient = writable(gradient)
    tensor = _stored(gradient)
    tensor.masked_fill_(~torch.isfinite(tensor), 0.0)
    return gradient


def rows_of_sparse(gradient: torch.Tensor, axis: int) -> bool:
    """Return whether a gradient is stored as some of its rows, and its units are the rows."""
    return gradient.layout is torch.sparse_coo and gradient.sparse_dim() == 1 and axis == 0


def writable(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient whose stored entries can be changed in place: the same one where it has them."""
    part = local(gradient)
    if part.layout is torch.strided:
        if part.is_contiguous() or 0 not in part.stride():
            return gradient
        # Several of its entries are one number in memory.
        return part.clone(memory_format=torch.contiguous_format)
    # A row that occurs twice in a sparse gradient is clipped by its sum, which is what the step applies.
    if part.layout is torch.sparse_coo and not part.is_coalesced():
        return part.coalesce()
    return gradient


def _stored(gradient: torch.Tensor) -> torch.Tensor:
    part = local(gradient)
    return part if part.layout is torch.strided else part.values()
