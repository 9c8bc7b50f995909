"""Verification of a shrink that changes no output: the smaller network equals the original."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.torch.exporting.proof import TOLERANCE, apart
from karikomi.torch.modules.deep_copies import undisturbed
from karikomi.torch.tracing.batches import leaves


@torch.no_grad()
def equal(
    original: nn.Module, small: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> float:
    """Return the largest relative difference of the outputs; `Unsupported` if it is above the tolerance."""
    worst = 0.0
    with undisturbed(original, small):
        expected, got = (leaves(module(*inputs, **options)) for module in (original, small))
    pairs = zip(expected, got, strict=True)
    for before, after in pairs:
        precision = torch.finfo(before.dtype).eps if before.is_floating_point() else 0.0
        allowed = max(TOLERANCE, 8 * precision)
        difference = apart(before, after)
        if not difference <= allowed:
            raise Unsupported(
                "the outputs of the smaller network would differ",
                where="torch.shrink",
                got=f"a relative difference of {difference:.3g}",
                allowed=f"{allowed:.3g}",
            )
        worst = max(worst, difference)
    return worst
