"""The output units of weights, by the type of their layer."""

from __future__ import annotations

from torch import nn

from karikomi.quantize import OutputUnits
from karikomi.torch.modules.parameters import unit_axes, unwrapped
from karikomi.torch.modules.prunable import TRANSPOSED


def output_units(module: nn.Module) -> dict[str, OutputUnits]:
    """Return parameter name -> its output units, of each parameter that has them.

    The weight of a transposed convolution has shape ``(in, out / groups, ...)``: the first axis splits
    into the groups, and an output channel is an index of the second axis within one group.

    >>> from torch.nn import ConvTranspose1d
    >>> output_units(ConvTranspose1d(4, 6, 3, groups=2))
    {'weight': OutputUnits(axis=1, groups=2)}
    """
    units = {name: OutputUnits(axis) for name, axis in unit_axes(module)[0].items()}
    for prefix, layer in unwrapped(module).named_modules():
        if isinstance(layer, TRANSPOSED) and layer.groups > 1:
            units[f"{prefix}.weight" if prefix else "weight"] = OutputUnits(1, layer.groups)
    return units
