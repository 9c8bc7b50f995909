"""Norms of the weights and of their change by a step, for a record; in bounded memory whatever the network.

A tensor of more than `MOST` entries is measured on an evenly spaced sample of about that many, its norm being
``sqrt(entries / sampled)`` times that of the sample; smaller ones are measured as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from karikomi.torch.distributed.dtensors import is_sharded
from karikomi.torch.numerics import norms
from karikomi.torch.numerics.norms import values

MOST = 16_384
"""The most entries of a tensor that are measured as a whole, and copied before each step."""


class StepNorms:
    """Norms before and after a step; costs a copy of at most 16,384 entries per tensor."""

    def __init__(self, found: Mapping[str, torch.Tensor]) -> None:
        # A sharded weight would need a reduction over its ranks: it is not measured here.
        self._found = {name: tensor for name, tensor in found.items() if not is_sharded(tensor)}
        self._before: list[torch.Tensor] | None = None
        self.sampled = any(tensor.numel() > MOST for tensor in self._found.values())

    def remember(self) -> None:
        """Copy what is to be compared after the step."""
        self._before = [_sample(tensor)[0].clone() for tensor in self._found.values()]

    def measure(self) -> tuple[dict[str, float], dict[str, float]] | tuple[None, None]:
        """Return name -> norm of the weights, and of their change since `remember`; ``None`` without it."""
        before, self._before = self._before, None
        if before is None or not self._found:
            return None, None
        samples = [_sample(tensor) for tensor in self._found.values()]
        now = [sample.contiguous() for sample, _ in samples]
        scales = [scale for _, scale in samples]
        moved = [after - then for after, then in zip(now, before, strict=True)]
        found = norms.norms([*now, *moved]).tolist()
        rows = (found[: len(now)], found[len(now) :])
        weights, updates = (
            {name: scale * size for name, scale, size in zip(self._found, scales, row, strict=True)}
            for row in rows
        )
        return weights, updates


def _sample(tensor: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return entries of a tensor, shape (k,), as a view where that is possible, and ``sqrt(entries / k)``."""
    flat = _flat(values(tensor))
    count = flat.numel()
    if count <= MOST:
        return flat, 1.0
    # Odd, since an even stride would fall on few columns of a matrix whose width is a power of two.
    part = flat[:: count // MOST | 1]
    return part, math.sqrt(count / part.numel())


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        # In the order of memory, without a copy.
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1)
