"""Pairs of layers whose channels can be rescaled against one another without changing the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from karikomi.torch.equalization.adjacent_layers import (
    CONVOLUTIONS,
    LAYERS,
    AdjacentLayers,
    argument,
    only_user,
    rank_of,
)
from karikomi.torch.labelling.label_run import name_of
from karikomi.torch.modules import codes

HOMOGENEOUS = frozenset(
    "relu leaky_relu dropout feature_dropout alpha_dropout clone contiguous alias detach to max_pool1d max_pool2d"
    " max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
    " adaptive_max_pool2d".split()
)
"""Operators with f(s x) = s f(x) for s > 0, channel by channel."""
_FLATTENED = frozenset("flatten view reshape _unsafe_view".split())


@dataclass(frozen=True, slots=True)
class LayerPair:
    """Names of two weights; `repeats`: so many inputs of the second belong to one output of the first."""

    first: str
    second: str
    repeats: int = 1


def layer_pairs(layers: AdjacentLayers) -> tuple[list[LayerPair], dict[str, str]]:
    """Return the pairs in the order of the forward pass, and name of each other weight -> why it begins none."""
    pairs: list[LayerPair] = []
    left_alone: dict[str, str] = {}
    for node in layers.calls(*LAYERS):
        name = layers.parameter(node, "weight")
        if name is None:
            continue
        found = _after(layers, node)
        if isinstance(found, str):
            left_alone[name] = found
        else:
            pairs.append(found)
    return pairs, left_alone


def why_fixed(layers: AdjacentLayers, node: fx.Node) -> str | None:
    """Return why the weight of a call cannot be changed, None if it can."""
    name = layers.parameter(node, "weight")
    bias = argument(node, "bias")
    if not layers.plain(name) or not (bias is None or layers.plain(layers.parameter(node, "bias"))):
        return "its weight or bias is computed, or used more than once"
    assert name is not None  # noqa: S101  (a plain one)
    if codes.of(layers.owner(name)):
        return "it is quantized: rescale before quantize_"
    return None


def _after(layers: AdjacentLayers, node: fx.Node) -> LayerPair | str:
    name = layers.parameter(node, "weight")
    reason = why_fixed(layers, node)
    if name is None or reason:
        return reason or "its weight is computed"
    channels, axis, at, repeats = _channels(layers, node), _axis(node), node, 1
    while True:
        user = only_user(at)
        if user is None:
            return "its output has several readers, or is an output of the network"
        if name_of(user) in LAYERS:
            break
        if name_of(user) in _FLATTENED and rank_of(user) == 2 and axis == 1:
            repeats *= max(user.meta["val"].shape[1] // at.meta["val"].shape[1], 1)
        elif name_of(user) not in HOMOGENEOUS:
            return f"{name_of(user)} follows"
        at = user
    if argument(user, "input") is not at:
        return "its output is a weight"
    second, reason = layers.parameter(user, "weight"), why_fixed(layers, user)
    if reason or second is None:
        return f"the layer after it is fixed: {reason}"
    linear = name_of(user) == "linear"
    inputs_axis = rank_of(at) - 1 if linear else 1
    here = rank_of(at) - 1 if axis == -1 else axis
    if here != inputs_axis or not (linear or name_of(user) in CONVOLUTIONS):
        return f"{name_of(user)} reads it along another axis"
    if _inputs(layers.owner(second)) != channels * repeats:
        return f"{name_of(user)} reads its channels in groups"
    return LayerPair(name, second, repeats)


def _axis(node: fx.Node) -> int:
    return -1 if name_of(node) == "linear" else 1


def _channels(layers: AdjacentLayers, node: fx.Node) -> int:
    name = layers.parameter(node, "weight")
    owner: Any = layers.owner(name or "")
    return owner.out_features if name_of(node) == "linear" else owner.out_channels


def _inputs(layer: Any) -> int:
    """Return the number of inputs whose weights can be scaled one by one."""
    if hasattr(layer, "in_features"):
        return layer.in_features
    single = layer.groups == 1 or layer.groups == layer.in_channels
    return layer.in_channels if single else -1


def input_ranges(layer: Any) -> torch.Tensor:
    """Return the largest magnitude of the weights that read each input."""
    weight = layer.weight.detach().double().abs()
    if getattr(layer, "groups", 1) > 1:
        # A depthwise convolution: each input has its own outputs.
        return weight.reshape(layer.groups, -1).amax(1)
    return weight.transpose(0, 1).flatten(1).amax(1)


@torch.no_grad()
def scale_inputs_(layer: Any, factors: torch.Tensor) -> None:
    """Multiply in place the weights that read each input."""
    weight = layer.weight
    if getattr(layer, "groups", 1) > 1:
        each = factors.repeat_interleave(len(weight) // layer.groups)
        weight.copy_(weight.double() * each.reshape(-1, *[1] * (weight.dim() - 1)))
    else:
        weight.copy_(weight.double() * factors.reshape(1, -1, *[1] * (weight.dim() - 2)))
