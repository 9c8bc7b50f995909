"""Modules as named NumPy arrays and back: what files, searches and other frameworks speak."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from niwaki.errors import InvalidArgument, Refused, suggest
from niwaki.torch.resizing import resize_


def to_arrays(module: nn.Module) -> dict[str, np.ndarray]:
    """Return name -> array for all parameters and buffers that a state dict holds; copies.

    A tensor that stands under two names (tied weights) stands under both. Raises `Refused` for
    dtypes that NumPy does not have (bfloat16): convert the module first.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in module.state_dict().items():
        if tensor.dtype is torch.bfloat16:
            raise Refused("NumPy has no bfloat16", where=name, hint="module.float() first")
        arrays[name] = np.ascontiguousarray(tensor.detach().cpu().numpy()).copy()
    return arrays


@torch.no_grad()
def fill_(module: nn.Module, arrays: Mapping[str, np.ndarray]) -> nn.Module:
    """Put named arrays into a module, in place, and return it.

    Linear, Conv and BatchNorm layers whose stored shape is smaller (a shrunk network) are resized
    first. Raises `InvalidArgument` naming the first tensor that is missing or unknown.
    """
    own = module.state_dict()
    _check_names(set(own), set(arrays))
    shapes = {
        name: arrays[name].shape
        for name, tensor in own.items()
        if tensor.shape != arrays[name].shape
    }
    if shapes:
        resize_(module, shapes)
        own = module.state_dict()
    for name, tensor in own.items():
        tensor.copy_(torch.from_numpy(np.ascontiguousarray(arrays[name])))
    return module


def _check_names(own: set[str], given: set[str]) -> None:
    missing, unknown = sorted(own - given), sorted(given - own)
    if missing:
        raise InvalidArgument(
            "a tensor of the module is missing",
            where=missing[0],
            hint=f"{len(missing)} missing; {suggest(missing[0], given)}",
        )
    if unknown:
        raise InvalidArgument(
            "the module has no such tensor",
            where=unknown[0],
            hint=f"{len(unknown)} unknown; {suggest(unknown[0], own)}",
        )
