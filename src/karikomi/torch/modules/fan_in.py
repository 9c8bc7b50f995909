"""Fan-in of a layer, for its weight and for its bias.

Separate from unit axes, because biases have a fan-in too, and because it is counted as in torch's
initialisation: the weights of a fresh layer are within ``1 / sqrt(fan_in)``.
"""

from __future__ import annotations

import math

from torch import nn

from karikomi.torch.modules.parameters import unwrapped

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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
    found: dict[str, int] = {}
    reasons: dict[str, str] = {}
    module = unwrapped(module)
    kept = {name for name, _ in module.named_parameters()}
    for prefix, layer in module.named_modules():
        for name, tensor in layer.named_parameters(prefix, recurse=False):
            if name not in kept:
                continue
            inputs = _fan_in(layer, name.rpartition(".")[2]) if tensor.is_floating_point() else None
            if inputs:
                found[name] = inputs
            else:
                reasons[name] = f"{type(layer).__name__} has no fan-in"
    return found, reasons


def _fan_in(layer: nn.Module, leaf: str) -> int | None:
    if leaf in ("weight", "bias"):
        if isinstance(layer, nn.Linear):
            return layer.in_features
        if isinstance(layer, nn.Bilinear):
            return layer.in1_features
        if isinstance(layer, _CONVOLUTIONS):
            return layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        if isinstance(layer, _TRANSPOSED):
            return layer.out_channels // layer.groups * math.prod(layer.kernel_size)
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        return layer.hidden_size
    if isinstance(layer, nn.MultiheadAttention):
        widths = {"k_proj_weight": layer.kdim, "v_proj_weight": layer.vdim}
        embedded = leaf in ("in_proj_weight", "in_proj_bias", "q_proj_weight")
        return layer.embed_dim if embedded else widths.get(leaf)
    return None
