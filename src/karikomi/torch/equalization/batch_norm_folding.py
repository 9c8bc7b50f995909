"""Fold batch norms into the layers before them: one multiplication fewer at run time, and one grid for both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx, nn

from karikomi.torch.equalization.adjacent_layers import (
    CONVOLUTIONS,
    LAYERS,
    TRANSPOSED,
    AdjacentLayers,
    argument,
    only_user,
    rank_of,
)
from karikomi.torch.equalization.output_scaling import (
    scale_outputs_,
    shift_outputs_,
    unscalable,
)
from karikomi.torch.internals import batch_norm_type
from karikomi.torch.labelling.label_run import name_of
from karikomi.torch.modules.parameters import unwrapped

WHERE = "torch.fold_batch_norms_"


class Folded(NamedTuple):
    """`folded`: name of a batch norm -> name of the weight that took it; `left_alone`: name -> why it stays."""

    folded: dict[str, str]
    left_alone: dict[str, str]


@torch.no_grad()
def fold_batch_norms_(module: nn.Module, inputs: Any) -> Folded:
    """Fold each batch norm into the linear layer or convolution before it, and put an identity in its place.

    ``w' = w * g, b' = (b - mean) * g + shift`` with ``g = scale / sqrt(variance + eps)`` per output channel: in eval
    mode the network computes the same. Codes of a quantized weight keep their integers: the scale of a channel is
    multiplied by ``|g|``, and a negative ``g`` turns the signs. A network with folded norms is for inference:
    there are no statistics left to train.

    `inputs`: example inputs, a tensor, the tuple of arguments, or a mapping of keywords. A norm stays, with the
    reason in ``left_alone``, where its input has another reader, or no layer makes it; where layer or norm are
    used more than once; where it has no running statistics; and where a codebook or a parametrization makes the
    weight. Raises `Unsupported` where `torch.export` does not take the module.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> x = torch.randn(2, 1, 8, 8)
    >>> before = net(x)
    >>> fold_batch_norms_(net, x).folded, bool(torch.allclose(net(x), before, atol=1e-5))
    ({'1': '0.weight'}, True)

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", section 3.2.
    """
    module = unwrapped(module)
    if not any(isinstance(item, batch_norm_type()) for item in module.modules()):
        return Folded({}, {})
    layers = AdjacentLayers(module, inputs, where=WHERE)
    folded: dict[str, str] = {}
    left_alone = {
        name: "not used in the forward pass"
        for name, item in module.named_modules()
        if isinstance(item, batch_norm_type())
    }
    for norm in layers.calls("batch_norm"):
        name = _path_of(layers, norm)
        if name is None or name not in left_alone:
            left_alone[name or norm.name] = "a call without a batch norm layer"
            continue
        reason = _why_not(layers, norm, name)
        if reason:
            left_alone[name] = reason
            continue
        weight = layers.parameter(argument(norm, "input"), "weight")
        assert weight is not None  # noqa: S101  (`_why_not` has seen to it)
        _fold_(module, name, layers.owner(weight))
        folded[name] = weight
        del left_alone[name]
    return Folded(folded, left_alone)


def _path_of(layers: AdjacentLayers, norm: fx.Node) -> str | None:
    known = layers.parameter(norm, "running_mean") or layers.parameter(norm, "weight")
    return None if known is None else known.rpartition(".")[0]


def _why_not(layers: AdjacentLayers, norm: fx.Node, name: str) -> str | None:
    before, mean = argument(norm, "input"), layers.parameter(norm, "running_mean")
    if argument(norm, "training") or mean is None:
        return "it has no running statistics"
    if not layers.read_once(mean) or _registered(layers.module, name) > 1:
        return "it is used more than once"
    if not isinstance(before, fx.Node) or before.op != "call_function":
        return "no layer makes its input"
    if name_of(before) not in LAYERS:
        return f"its input is made by {name_of(before)}"
    if only_user(before) is not norm:
        return "its input has another reader"
    if name_of(before) == "linear" and rank_of(before) != 2:
        return "its channels are not those of the linear layer before it"
    if name_of(before) in (*CONVOLUTIONS, *TRANSPOSED) and _unbatched(before):
        return "the convolution before it has no batch axis"
    weight, bias = (layers.parameter(before, leaf) for leaf in ("weight", "bias"))
    if not layers.plain(weight) or not (argument(before, "bias") is None or layers.plain(bias)):
        return "the weight or bias before it is computed or used more than once"
    assert weight is not None  # noqa: S101  (a plain one)
    return unscalable(layers.owner(weight))


def _unbatched(node: fx.Node) -> bool:
    return rank_of(node) != rank_of(argument(node, "weight"))


def _registered(module: nn.Module, path: str) -> int:
    """Return under how many names a module is registered."""
    item = module.get_submodule(path)
    return sum(part is item for _, part in module.named_modules(remove_duplicate=False))


def _fold_(module: nn.Module, name: str, layer: Any) -> None:
    norm: Any = module.get_submodule(name)
    variance, mean = norm.running_var.double(), norm.running_mean.double()
    scale = torch.ones_like(mean) if norm.weight is None else norm.weight.double()
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias.double()
    factors = scale * (variance + norm.eps).rsqrt()
    scale_outputs_(layer, factors)
    shift_outputs_(layer, shift - mean * factors)
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Identity())
