"""Every construct of `shrink_networks` at half width: parameters by hand, and removing equals zeroing."""

from __future__ import annotations

import pytest
import torch

from karikomi.torch.shrinking.smaller_copy import shrink
from shrink_networks import NETWORKS
from zeroing import differ, zeroed

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
