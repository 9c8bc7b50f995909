"""Rounding with a straight-through gradient, and the bits of what is rounded, as differentiable functions."""

from __future__ import annotations

from typing import Any

import torch

from karikomi.quantize.rate_model import bits_of_magnitudes


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, step: torch.Tensor, limit: int, share: float
    ) -> torch.Tensor:
        ratio = weight.to(step.dtype) / step
        ctx.save_for_backward(ratio)
        ctx.limit, ctx.share, ctx.like = limit, share, (weight.dtype, step.shape)
        return (ratio.round().clamp_(-limit, limit) * step).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, Any, None, None]:
        (ratio,) = ctx.saved_tensors
        dtype, shape = ctx.like
        inside = ratio.abs() <= ctx.limit
        of_step = None
        if ctx.needs_input_grad[1]:
            codes = ratio.round().clamp_(-ctx.limit, ctx.limit)
            slope = torch.where(inside, codes - ratio, codes).mul_(gradients[0])
            of_step = slope.sum_to_size(shape) * ctx.share
        return (gradients[0] * inside).to(dtype), of_step, None, None


class _Bits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, step: torch.Tensor, limit: int, share: float
    ) -> torch.Tensor:
        ratio = weight.to(step.dtype) / step
        table, counts = _learned(ratio, limit)
        rises = torch.cat([table.diff(), table.new_zeros(1)])
        lower = ratio.abs().clamp_(max=limit).to(torch.int64)
        slope = rises.index_select(0, lower.flatten()).view_as(ratio)
        slope.copysign_(ratio).masked_fill_(ratio == 0, 0.0)
        ctx.save_for_backward(slope, ratio, step)
        ctx.share, ctx.dtype = share, weight.dtype
        return (table * counts).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, Any, None, None]:
        slope, ratio, step = ctx.saved_tensors
        slope = slope * (gradients[0] / step)
        of_step = None
        if ctx.needs_input_grad[1]:
            of_step = (slope * ratio).neg_().sum_to_size(step.shape) * ctx.share
        return slope.to(ctx.dtype), of_step, None, None


def rounded(
    weight: torch.Tensor, step: torch.Tensor, *, limit: int, share: float = 1.0
) -> torch.Tensor:
    """Return weights on a uniform grid, with gradients for the weights and for the step.

    ``v = w / s``; ``step * clamp(round(v), -limit, limit)``. The gradient of a weight passes where ``|v| <= limit``
    and is zero elsewhere; that of the step is ``sum g (round(v) - v)`` inside and ``sum g clamp(v)`` outside, times
    `share`.

    `weight`: floats of any shape; `step`: positive, a float32 tensor that broadcasts to it; `limit`: the largest code.

    >>> weight = torch.tensor([0.4, 1.1, -9.0], requires_grad=True)
    >>> value = rounded(weight, torch.tensor(0.5), limit=3)
    >>> value.sum().backward()
    >>> value.tolist(), weight.grad.tolist()
    ([0.5, 1.0, -1.5], [1.0, 1.0, 0.0])

    Source: Bengio, Léonard and Courville 2013 (straight-through estimator); Esser, McKinstry, Bablani, Appuswamy and
    Modha 2020, "Learned Step Size Quantization", with a symmetric range.
    """
    return _Rounded.apply(weight, step, limit, share)  # type: ignore[no-any-return]


def bits(
    weight: torch.Tensor, step: torch.Tensor, *, limit: int, share: float = 1.0
) -> torch.Tensor:
    """Return the bits of the codes of weights, 0-d, with gradients for the weights and for the step.

    The value is that of the rounded codes, under `karikomi.quantize.rate_model.bits_of_magnitudes` of their counts;
    the gradient is the slope of `interpolated_bits` at ``w / s``, that of the step times `share`.

    >>> weight = torch.tensor([0.25, -1.0, 0.0, 0.1], requires_grad=True)
    >>> total = bits(weight, torch.tensor(0.5), limit=3)
    >>> total.backward()
    >>> round(total.item(), 2), [round(slope, 2) for slope in weight.grad.tolist()]
    (6.44, [8.99, -7.41, 0.0, 8.99])
    """
    return _Bits.apply(weight, step, limit, share)  # type: ignore[no-any-return]


@torch.no_grad()
def size(weight: torch.Tensor, step: torch.Tensor, *, limit: int) -> tuple[float, int]:
    """Return the bits of the codes of weights, and how many are not zero."""
    table, counts = _learned(weight.to(step.dtype) / step, limit)
    return float((table * counts).sum()), int(counts[1:].sum())


def _learned(ratio: torch.Tensor, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bits of each magnitude 0..limit, learned from the codes of these ratios, and their counts."""
    codes = ratio.round().abs_().clamp_(max=limit).to(torch.int64)
    counts = torch.bincount(codes.flatten(), minlength=limit + 1).to(ratio.dtype)
    return bits_of_magnitudes(counts, xp=_Namespace(counts.device)), counts


class _Namespace:
    """The array operations of the rate model, on one device."""

    sum = staticmethod(torch.sum)
    log = staticmethod(torch.log)
    exp = staticmethod(torch.exp)
    sqrt = staticmethod(torch.sqrt)
    where = staticmethod(torch.where)
    reshape = staticmethod(torch.reshape)

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def arange(self, count: int) -> torch.Tensor:
        return torch.arange(count, device=self._device)

    def asarray(self, array: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return array.to(dtype)

    def max(self, array: torch.Tensor, axis: int) -> torch.Tensor:
        return array.amax(axis)
