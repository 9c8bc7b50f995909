"""Weight sharing while training: a tensor's entries are looked up in a codebook, and the codebook learns.

The gradient of a centroid is the sum of the gradients of its entries (Han, Mao and Dally 2016,
section 3.3); which entry belongs to which centroid is fixed, and code 0 stays exactly zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from karikomi.errors import UnknownName
from karikomi.quantize import Codebook, Coded
from karikomi.torch.modules.parametrized import own_class_


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes)
        ctx.entries = len(values)
        return values[codes]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (codes,) = ctx.saved_tensors
        weights = gradients[0].reshape(-1)
        summed = torch.bincount(codes.reshape(-1), weights=weights, minlength=ctx.entries)
        summed[0] = 0.0
        return summed.to(weights.dtype), None


class _Shared(nn.Module):
    codes: torch.Tensor

    def __init__(self, coded: Coded) -> None:
        super().__init__()
        self.register_buffer("codes", torch.from_numpy(coded.codes.astype(np.int64)))
        if not isinstance(coded.grid, Codebook):
            raise TypeError("only codebooks are shared")
        self._values = torch.from_numpy(coded.grid.values.copy())

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return _Lookup.apply(values, self.codes)  # type: ignore[no-any-return]

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return self._values.to(weight)


def share_(module: nn.Module, coded: Mapping[str, Coded]) -> None:
    """Replace each named parameter by a lookup into its codebook, whose values are then trained."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in coded.items():
        if name not in parameters:
            raise UnknownName("no such parameter to share", where=name)
        tied = [alias for alias, owned in parameters.items() if owned is parameters[name]]
        _share_all_(module, tied, tensor)


def _share_all_(module: nn.Module, names: list[str], coded: Coded) -> None:
    """Make all owners of one parameter (tied weights) use one codebook."""
    first: Any = None
    for name in names:
        prefix, _, leaf = name.rpartition(".")
        layer = module.get_submodule(prefix)
        # A parameter of its own, because registering changes the old one in place.
        setattr(layer, leaf, nn.Parameter(getattr(layer, leaf).detach().clone()))
        own_class_(layer)
        parametrize.register_parametrization(layer, leaf, _Shared(coded), unsafe=True)
        chain: Any = layer.parametrizations[leaf]  # type: ignore[index]
        if first is None:
            first = chain.original
        chain.original = first


def shared(module: nn.Module) -> dict[str, Coded]:
    """Return name -> codes and codebook, as trained so far, of the parameters that `share_` replaced."""
    found: dict[str, Coded] = {}
    for prefix, layer in module.named_modules():
        if not parametrize.is_parametrized(layer):
            continue
        for leaf, chain in layer.parametrizations.items():  # type: ignore[union-attr]
            if isinstance(chain[0], _Shared):
                grid = Codebook(chain.original.detach().cpu().float().numpy().copy())
                codes = chain[0].codes.cpu().numpy().astype(grid.code_dtype)
                found[f"{prefix}.{leaf}" if prefix else leaf] = Coded(codes, grid)
    return found
