"""One layer re-fitted: the sums of its dense outputs and of the inputs that are left, made by torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from karikomi.reconstruction.affine_fit import AffineFit
from karikomi.torch.tracing.patches import patches
from karikomi.torch.tracing.weight_reads import Reading


@dataclass(slots=True)
class Sums(AffineFit):
    """Sums over samples of what a weight multiplies."""

    def read(self, reading: Reading, targets: torch.Tensor) -> None:
        """Add the inputs of one reading, and its targets in the layout of its outputs."""
        groups = reading.window.groups if reading.window else 1
        rows = _rows(reading, targets).unflatten(-1, (groups, -1)).movedim(1, 0)
        first = 0
        for block in patches(reading):
            own = rows[:, first : first + block.shape[1]].to(block.dtype)
            first += block.shape[1]
            inputs = torch.cat([block, block.new_ones((*block.shape[:2], 1))], dim=2)
            products = (inputs.mT @ inputs, own.mT @ inputs)
            gram, cross = (product.double().cpu().numpy() for product in products)
            self.add_products(gram, cross, float(own.double().square().sum()))


def _rows(reading: Reading, targets: torch.Tensor) -> torch.Tensor:
    """Return targets as (samples, outputs), in the order of the samples of `patches`."""
    if reading.window is None:
        return targets.reshape(-1, targets.shape[-1])
    if targets.dim() == len(reading.window.kernel) + 1:
        targets = targets[None]
    return targets.movedim(1, -1).flatten(0, -2)
