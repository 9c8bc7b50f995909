"""Verification of a shrink: the outputs of the smaller module equal those of the original."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.torch.tracing.batches import leaves

TOLERANCE = 1e-5
"""Of the largest magnitude of an output; 8 machine epsilons where that is more (half precision)."""


def difference(original: nn.Module, small: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Return the largest relative difference on `inputs` and random ones; `Unsupported` if above `TOLERANCE`."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for arguments in (inputs, tuple(_random(leaf, generator) for leaf in inputs)):
        expected = leaves(original(*arguments))
        for before, after in zip(expected, leaves(small(*arguments)), strict=True):
            worst = max(worst, _relative_difference(before, after))
    return worst


def _relative_difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    if expected.shape != got.shape:
        raise Unsupported(
            "the shape of an output would change", where="torch.shrink", got=got.shape
        )
    if expected.numel() == 0:
        return 0.0
    precision = torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0.0
    allowed = max(TOLERANCE, 8 * precision)
    scale = float(expected.double().abs().max()) or 1.0
    apart = float((expected.double() - got.double()).abs().max()) / scale
    if not apart <= allowed:
        raise Unsupported(
            "the outputs of the smaller network would differ",
            where="torch.shrink",
            got=f"a relative difference of {apart:.3g}",
            allowed=f"{allowed:.3g}",
        )
    return apart


def _random(value: Any, generator: torch.Generator) -> Any:
    """Return a random tensor like an input: normal for floats, else its entries shuffled."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator).to(value)
    order = torch.randperm(value.numel(), generator=generator).to(value.device)
    return value.reshape(-1)[order].reshape(value.shape)
