"""Quantize the weights of a torch module in place, and remember the codes for the packed file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from karikomi.errors import InvalidArgument
from karikomi.quantize import Coded, kmeans, uniform
from karikomi.select import select
from karikomi.torch.modules import codes
from karikomi.torch.modules.parameters import unit_axes, unwrapped
from karikomi.torch.modules.prunable import prunable


@torch.no_grad()
def quantize_(
    module: nn.Module,
    *,
    bits: int | None = None,
    entries: int | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> dict[str, Coded]:
    """Round weights to a grid in place, and return name -> codes and grid.

    `bits` (2..16): a symmetric uniform grid per output unit, ``w = scale * round(w / scale)``.
    `entries`: a codebook of so many non-zero values per tensor by 1-D k-means (weight sharing). Exactly
    one of the two. Zeros stay exact zeros. Acts on the weights of Linear and Conv layers that `only`
    and `exclude` (globs) leave; `kk.save` then stores the codes instead of floats, and `kk.load` gives
    float32 arrays. Prune and shrink first: a changed weight has no code.

    Raises `InvalidArgument` for both or none of the two, `NonFinite` naming a tensor with NaN.

    >>> import torch, karikomi as kk
    >>> layer = torch.nn.Linear(4, 2)
    >>> coded = quantize_(layer, bits=8)
    >>> list(coded), bool(torch.equal(layer.weight, torch.from_numpy(coded["weight"].decode())))
    (['weight'], True)

    Source: per-channel symmetric grids as in ONNX Runtime and LiteRT; codebooks after Han, Mao and Dally
    2016. Deviation: zero is a code of its own, so that pruned weights survive.
    """
    if (bits is None) == (entries is None):
        raise InvalidArgument(
            "give bits for a uniform grid, or entries for a codebook",
            where="torch.quantize_",
            got=f"bits={bits}, entries={entries}",
            allowed="exactly one",
        )
    weights, _ = prunable(module)
    axes, _ = unit_axes(module)
    chosen = select(weights, only=only, exclude=exclude, where="torch.quantize_")
    coded: dict[str, Coded] = {}
    for name in chosen:
        array = weights[name].detach().cpu().float().numpy()
        if entries is not None:
            coded[name] = kmeans(array, entries=entries, name=name)
        else:
            assert bits is not None  # noqa: S101  (one of the two was given)
            coded[name] = uniform(array, bits=bits, axis=axes.get(name), name=name)
    for name, tensor in coded.items():
        weights[name].copy_(codes.decoded(tensor, weights[name].dtype))
    codes.add_(unwrapped(module), coded)
    return coded
