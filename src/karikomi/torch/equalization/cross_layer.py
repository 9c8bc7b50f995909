"""Cross-layer equalization: channels of adjacent layers get like ranges, which one scale per tensor can serve."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from karikomi.errors import check
from karikomi.torch.equalization.adjacent_layers import AdjacentLayers
from karikomi.torch.equalization.layer_pairs import (
    LayerPair,
    input_ranges,
    layer_pairs,
    scale_inputs_,
)
from karikomi.torch.equalization.output_scaling import per_unit, scale_outputs_
from karikomi.torch.modules.parameters import unwrapped

WHERE = "torch.equalize_"
NEAR = 1e-3
"""The largest change of a range, as a share of it, at which the rounds end."""


class Equalized(NamedTuple):
    """`pairs`: first weight -> second weight; `left_alone`: weight -> why it begins no pair; `rounds` that it took."""

    pairs: dict[str, str]
    left_alone: dict[str, str]
    rounds: int


@torch.no_grad()
def equalize_(module: nn.Module, inputs: Any, *, rounds: int = 20) -> Equalized:
    """Rescale the channels between adjacent layers in place, so that both have the same range for each channel.

    ``W1[i] /= s_i, b1[i] /= s_i, W2[:, i] *= s_i`` with ``s_i = sqrt(r1_i / r2_i)``, r1 and r2 the largest magnitudes
    of the weights of channel i: afterwards both are ``sqrt(r1_i r2_i)``. What lies between must be positively
    homogeneous (ReLU, pooling, flattening), so the network computes the same. Chains are gone through up to `rounds`
    times. Fold batch norms first (`fold_batch_norms_`) and quantize afterwards; it needs no data. A channel whose
    weights are all zero on one side stays.

    `inputs`: example inputs, a tensor, the tuple of arguments, or a mapping of keywords. Raises `Unsupported` where
    `torch.export` does not take the module.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.randn(3, 4)
    >>> before = net(x)
    >>> equalize_(net, x).pairs, bool(torch.allclose(net(x), before, atol=1e-5))
    ({'0.weight': '2.weight'}, True)

    Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1.
    """
    check(WHERE, (rounds >= 1, "rounds out of range", rounds, ">= 1"))
    module = unwrapped(module)
    layers = AdjacentLayers(module, inputs, where=WHERE)
    pairs, left_alone = layer_pairs(layers)
    done = 0
    while pairs and done < rounds:
        done += 1
        if max(_balance_(layers, pair) for pair in pairs) < NEAR:
            break
    return Equalized({pair.first: pair.second for pair in pairs}, left_alone, done)


def _balance_(layers: AdjacentLayers, pair: LayerPair) -> float:
    """Rescale one pair, and return the largest relative change."""
    first, second = layers.owner(pair.first), layers.owner(pair.second)
    ours = output_ranges(first)
    theirs = input_ranges(second).reshape(len(ours), -1).amax(1)
    usable = (ours > 0) & (theirs > 0)
    factors = torch.where(usable, (ours / theirs).sqrt(), 1.0)
    factors = torch.where(torch.isfinite(factors) & (factors > 0), factors, 1.0)
    scale_outputs_(first, 1 / factors)
    scale_inputs_(second, factors.repeat_interleave(pair.repeats))
    return float((factors - 1).abs().max()) if len(factors) else 0.0


def output_ranges(layer: Any) -> torch.Tensor:
    """Return the largest magnitude of the weights of each output channel."""
    weight = layer.weight.detach().double().abs()
    channels = getattr(layer, "out_channels", None) or layer.out_features
    places = per_unit(layer, torch.arange(channels, device=weight.device), weight)
    found = torch.zeros(channels, dtype=weight.dtype, device=weight.device)
    flat = places.expand_as(weight).reshape(-1)
    return found.scatter_reduce(0, flat, weight.reshape(-1), "amax")
