"""Quantize the weights of a torch module in place, and keep the codes for the packed file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.quantize import Coded, OutputUnits, quantizer_for
from karikomi.select import select
from karikomi.torch.modules import codes
from karikomi.torch.modules.parameters import check_values, unwrapped
from karikomi.torch.modules.prunable import prunable
from karikomi.torch.quantization.output_units import output_units


class Codes(dict[str, Coded]):
    """Parameter name -> codes and grid; `left_alone`: name -> why a parameter stays as it is."""

    def __init__(self, coded: Mapping[str, Coded], left_alone: Mapping[str, str]) -> None:
        super().__init__(coded)
        self.left_alone = dict(left_alone)


@torch.no_grad()
def quantize_(
    module: nn.Module,
    *,
    bits: int | None = None,
    entries: int | None = None,
    method: str | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Codes:
    """Round weights to a grid in place, and return name -> codes and grid.

    `bits` (2..16): a symmetric uniform grid per output unit, ``w = scale * round(w / scale)``.
    `entries`: a codebook of so many non-zero values per tensor by 1-D k-means (weight sharing). Exactly
    one of the two. `method`: the name of a registered quantizer, by default ``"uniform"`` for `bits` and
    ``"kmeans"`` for `entries`. Zeros stay exact zeros. Acts on the weights of Linear and Conv layers that
    `only` and `exclude` (globs) leave; `kk.save` then stores the codes instead of floats, and `kk.load`
    gives float32 arrays. The result's ``left_alone`` has the reasons for all other parameters: biases, and what
    a layer computes its weight from (``spectral_norm``, ``weight_norm``) among them.
    Prune and shrink first: a changed weight has no code. An output unit of a
    grouped transposed convolution is one output channel of one group.

    Raises `InvalidArgument` for both or none of the two, or a method that takes the other one,
    `UnknownName` for an unknown method, `Unsupported` where nothing can be quantized, `NonFinite` naming a
    tensor with NaN.

    >>> import torch, karikomi as kk
    >>> layer = torch.nn.Linear(4, 2)
    >>> coded = quantize_(layer, bits=8)
    >>> list(coded), bool(torch.equal(layer.weight, torch.from_numpy(coded["weight"].decode())))
    (['weight'], True)

    Source: per-channel symmetric grids as in ONNX Runtime and LiteRT; codebooks after Han, Mao and Dally
    2016. Deviation: zero is a code of its own, so that pruned weights survive.
    """
    quantize = quantizer_for(method, bits=bits, entries=entries, where="torch.quantize_")
    check_values(dict(unwrapped(module).named_parameters()), where="torch.quantize_")
    weights, left_alone = prunable(module)
    if not weights:
        raise Unsupported(
            "nothing of this can be quantized",
            where="torch.quantize_",
            got="; ".join(f"{n}: {why}" for n, why in list(left_alone.items())[:3])
            or "a module without parameters",
            allowed="weights of Linear, Conv and ConvTranspose layers",
        )
    units = output_units(module)
    coded: dict[str, Coded] = {}
    for name in select(weights, only=only, exclude=exclude, where="torch.quantize_"):
        array = weights[name].detach().cpu().float().numpy()
        coded[name] = quantize(array, units=units.get(name, OutputUnits()), name=name)
    for name, tensor in coded.items():
        weights[name].copy_(codes.decoded(tensor, weights[name].dtype))
    codes.add_(unwrapped(module), coded)
    unselected = {name: "not selected" for name in weights if name not in coded}
    return Codes(coded, {**left_alone, **unselected})
