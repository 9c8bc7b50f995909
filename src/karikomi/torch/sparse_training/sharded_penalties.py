"""Terms of a loss on sharded weights: gradients and masks with the placements of the weights.

Separate because terms use DTensor arithmetic, while bounds and masks use shards: autograd may return any
placement, and FSDP adds its own gradient shard by shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from karikomi.torch.distributed.dtensors import is_sharded, local
from karikomi.torch.pruning import mask_shards
from karikomi.torch.pruning.masks import Masks


def followed(parameter: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same entries, with the parameter's placements for its gradient."""
    return _laid(local(parameter), parameter) if is_sharded(parameter) else parameter


def beside(
    masks: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Return masks, whole or this rank's part, with the placements of their parameters; or raise `InvalidArgument`."""
    places = masks.places if isinstance(masks, Masks) else {}
    laid: dict[str, Any] = dict(masks)
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if isinstance(mask, torch.Tensor) and parameter is not None and is_sharded(parameter):
            part = mask_shards.here(name, local(mask), places.get(name), parameter)
            laid[name] = _laid(part.to(local(parameter.detach()).device), parameter)
    return laid


def _laid(part: torch.Tensor, like: Any) -> torch.Tensor:
    # A slow import, already done where a parameter is a DTensor.
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
