"""The original with zeros in place of what a smaller network lacks, found by its values; and how far two are apart."""

from __future__ import annotations

import copy

import torch
from torch import nn


def kept_of(original: torch.Tensor, small: torch.Tensor, folded: float = 1.0) -> list[torch.Tensor]:
    """Return the indices along each axis at which the entries of a smaller tensor are found in the original."""
    values = original.flatten().tolist()
    places = {value: place for place, value in enumerate(values)}
    if folded != 1.0:
        scaled = (original * torch.tensor(folded, dtype=torch.float64).float()).flatten()
        places |= {value: place for place, value in enumerate(scaled.tolist())}
    found = torch.tensor([places[value] for value in small.flatten().tolist()])
    return [axis.unique() for axis in torch.unravel_index(found, original.shape)]


@torch.no_grad()
def zeroed(module: nn.Module, small: nn.Module, folded: float) -> nn.Module:
    """Return a copy of the original in which every entry of a parameter that the smaller one lacks is zero."""
    left = dict(small.named_parameters(remove_duplicate=False))
    original = copy.deepcopy(module)
    for name, parameter in original.named_parameters():
        for axis, kept in enumerate(kept_of(parameter, left[name], folded)):
            gone = torch.ones(parameter.shape[axis], dtype=torch.bool)
            gone[kept] = False
            parameter.movedim(axis, 0)[gone] = 0.0
    return original


def differ(one: object, other: object) -> float:
    pairs = zip(*map(torch.utils._pytree.tree_leaves, (one, other)), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
