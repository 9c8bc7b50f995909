"""Fan-in of a layer, for its weight and for its bias, counted as in torch's initialisation."""

from __future__ import annotations

import math

from torch import nn

from karikomi.torch.modules.parameters import owned
from karikomi.torch.modules.prunable import CONVOLUTIONS, TRANSPOSED


def fan_ins(module: nn.Module) -> tuple[dict[str, int], dict[str, str]]:
    """Return ``(name -> fan-in, name -> why it has none)`` for the parameters of a module.

    Linear and Bilinear: the (first) inputs. Convolutions: the channels of one group times the kernel,
    input channels, for transposed ones output channels, as torch initialises them. Recurrent layers:
    the hidden size. Attention: the input width of a projection. The bias of a layer has the
    fan-in of its weight.

    >>> layers = nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8))
    >>> fan_ins(layers)
    ({'0.weight': 75, '0.bias': 75}, {'1.weight': 'BatchNorm2d has no fan-in', '1.bias': 'BatchNorm2d has no fan-in'})
    """
    inputs: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for layer, name, tensor in owned(module):
        count = _fan_in(layer, name.rpartition(".")[2]) if tensor.is_floating_point() else None
        if count:
            inputs[name] = count
        else:
            reasons[name] = f"{type(layer).__name__} has no fan-in"
    return inputs, reasons


def _fan_in(layer: nn.Module, leaf: str) -> int | None:
    if leaf in ("weight", "bias"):
        if isinstance(layer, nn.Linear):
            return layer.in_features
        if isinstance(layer, nn.Bilinear):
            return layer.in1_features
        if isinstance(layer, CONVOLUTIONS):
            return layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        if isinstance(layer, TRANSPOSED):
            return layer.out_channels // layer.groups * math.prod(layer.kernel_size)
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        return layer.hidden_size
    if isinstance(layer, nn.MultiheadAttention):
        widths = {"k_proj_weight": layer.kdim, "v_proj_weight": layer.vdim}
        embedded = leaf in ("in_proj_weight", "in_proj_bias", "q_proj_weight")
        return layer.embed_dim if embedded else widths.get(leaf)
    return None
