"""Every construct of `shrink_networks` at half width: parameters by hand, and removing equals zeroing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from karikomi.torch.shrinking.smaller_copy import shrink
from shrink_networks import NETWORKS


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


HEADS = [name for name, network in NETWORKS.items() if network.heads]


# What torch says of projections on some machines.
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("name", "target"),
    [(name, "width") for name in NETWORKS] + [(name, "heads") for name in HEADS],
)
def test_half_of_it_computes_what_zeros_would(name: str, target: str) -> None:
    network = NETWORKS[name]
    module, inputs = network.build()
    small, report = shrink(module, inputs, **{target: 0.5})  # type: ignore[arg-type]
    assert report.parameters_after == sum(p.numel() for p in small.parameters())
    assert report.parameters_after == (network.inner if target == "width" else network.heads)
    assert report.max_difference <= 1e-5
    fresh = [torch.randn_like(x) if x.is_floating_point() else x.flip(0) for x in inputs]
    with torch.no_grad():
        got = small(*fresh)
        if not report.statistics:
            assert differ(zeroed(module, small, network.folded)(*fresh), got) <= 2e-5
