"""Codes of quantized tensors, stored on their layers, so that a file can contain codes, not floats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.quantize import Coded

_ATTRIBUTE = "_karikomi_coded"


def remember_(module: nn.Module, coded: Mapping[str, Coded]) -> None:
    """Store the codes of the named tensors with their layers, and drop those of all others."""
    for layer in module.modules():
        layer.__dict__.pop(_ATTRIBUTE, None)
    add_(module, coded)


def add_(module: nn.Module, coded: Mapping[str, Coded]) -> None:
    """Store the codes of the named parameters and buffers with their layers, under all their names."""
    parameters: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    parameters |= dict(module.named_buffers(remove_duplicate=False))
    by_identity = {
        id(parameters[name]): tensor for name, tensor in coded.items() if name in parameters
    }
    for name, parameter in parameters.items():
        if id(parameter) in by_identity:
            prefix, _, leaf = name.rpartition(".")
            codes = module.get_submodule(prefix).__dict__.setdefault(_ATTRIBUTE, {})
            codes[leaf] = by_identity[id(parameter)]


def recall(module: nn.Module) -> dict[str, Coded]:
    """Return name -> codes; raise `Unsupported` naming the first tensor that changed since."""
    found = {}
    for name, layer, leaf, entry in _entries(module):
        weight: torch.Tensor = getattr(layer, leaf).detach().cpu()
        if weight.shape != entry.shape or not torch.equal(decoded(entry, weight.dtype), weight):
            raise Unsupported(
                "the weights have changed since quantize_",
                where=name,
                hint="call kk.torch.quantize_ again before kk.save",
            )
        found[name] = entry
    return found


def of(layer: nn.Module) -> dict[str, Coded]:
    """Return attribute -> codes of the quantized parameters of one layer."""
    return dict(layer.__dict__.get(_ATTRIBUTE, {}))


def replace_(layer: nn.Module, leaf: str, coded: Coded | None) -> None:
    """Store other codes for one parameter of a layer, or none."""
    stored = layer.__dict__.get(_ATTRIBUTE, {})
    stored.pop(leaf, None)
    if coded is not None:
        layer.__dict__.setdefault(_ATTRIBUTE, stored)[leaf] = coded


def holds_codes(module: nn.Module) -> bool:
    """Return whether anything in the module was quantized."""
    return any(True for _ in _entries(module))


def decoded(coded: Coded, dtype: torch.dtype) -> torch.Tensor:
    """Return the decoded weights, as a dtype."""
    # A tensor without axes is decoded to a number.
    return torch.from_numpy(np.asarray(coded.decode())).to(dtype)


def _entries(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Coded]]:
    for prefix, layer in module.named_modules(remove_duplicate=False):
        for leaf, item in layer.__dict__.get(_ATTRIBUTE, {}).items():
            yield (f"{prefix}.{leaf}" if prefix else leaf), layer, leaf, item
