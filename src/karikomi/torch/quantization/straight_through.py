"""Rounding with a straight-through gradient, and the bits of what is rounded, as differentiable functions."""

from __future__ import annotations

from typing import Any

import torch

from karikomi.quantize.rate_model import fitted


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
        gradient = gradients[0].to(ratio.dtype)
        inside = gradient * (ratio.abs() <= ctx.limit)
        of_step = None
        if ctx.needs_input_grad[1]:
            codes = ratio.round().clamp_(-ctx.limit, ctx.limit)
            slope = codes.mul_(gradient).addcmul_(ratio, inside, value=-1)
            of_step = slope.sum_to_size(shape) * ctx.share
        return inside.to(dtype), of_step, None, None


class _Bits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, step: torch.Tensor, limit: int, share: float
    ) -> torch.Tensor:
        ratio = weight.to(step.dtype) / step
        codes = ratio.round().abs_().clamp_(max=limit)
        nonzero, magnitude = codes.count_nonzero().to(ratio.dtype), codes.sum()
        model = fitted(codes.numel(), nonzero, magnitude, xp=torch)
        ctx.save_for_backward(model.slope(ratio, xp=torch), ratio, step)
        ctx.share, ctx.dtype = share, weight.dtype
        return model.total(codes.numel(), nonzero, magnitude)

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

    The value is that of the rounded codes, under the density of `karikomi.quantize.rate_model.fitted` to them; the
    gradient is its slope at ``w / s``, that of the step times `share`.

    >>> weight = torch.tensor([0.25, -1.0, 0.0, 0.1], requires_grad=True)
    >>> total = bits(weight, torch.tensor(0.5), limit=3)
    >>> total.backward()
    >>> round(total.item(), 2), [round(slope, 2) for slope in weight.grad.tolist()]
    (6.34, [6.0, -2.0, 0.0, 6.0])
    """
    return _Bits.apply(weight, step, limit, share)  # type: ignore[no-any-return]


@torch.no_grad()
def size(weight: torch.Tensor, step: torch.Tensor, *, limit: int) -> tuple[float, int]:
    """Return the bits of the codes of weights by their entropy, and how many are not zero.

    >>> size(torch.tensor([0.0, 0.1, 0.5, 1.0]), torch.tensor(0.5), limit=3)
    (6.0, 2)
    """
    codes = (weight.to(step.dtype) / step).round_().clamp_(-limit, limit).to(torch.int64)
    counts = torch.bincount(codes.flatten() + limit, minlength=2 * limit + 1).double()
    logs = torch.log2(counts / counts.sum().clamp(min=1.0)).clamp_(min=-1e9)
    return -float((counts * logs).sum()), int(counts.sum() - counts[limit])
