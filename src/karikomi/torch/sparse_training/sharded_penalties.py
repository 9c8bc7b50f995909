"""Terms of a loss on sharded weights: their gradients lie as the weights do, and masks beside them.

Separate because terms are made of DTensor arithmetic, where bounds and masks work on parts: what autograd
makes of it may lie in any way, and FSDP adds its own gradient to it part by part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from karikomi.torch.distributed.dtensors import is_sharded, local
from karikomi.torch.pruning import mask_shards
from karikomi.torch.pruning.masks import Masks


def followed(parameter: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same entries whose gradient comes back lying as the parameter does."""
    return _laid(local(parameter), parameter) if is_sharded(parameter) else parameter


def beside(
    masks: Mapping[str, torch.Tensor] | None, parameters: Mapping[str, torch.Tensor]
) -> dict[str, Any] | None:
    """Return masks that lie as their parameters do; each may be whole, or this rank's part.

    Raises `InvalidArgument` for one that fits neither.
    """
    if masks is None:
        return None
    places = masks.places if isinstance(masks, Masks) else {}
    laid: dict[str, Any] = dict(masks)
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if isinstance(mask, torch.Tensor) and parameter is not None and is_sharded(parameter):
            own = mask_shards.here(name, local(mask), places.get(name), parameter)
            laid[name] = _laid(own.to(local(parameter.detach()).device), parameter)
    return laid


def _laid(part: torch.Tensor, like: Any) -> torch.Tensor:
    # Whoever has such a parameter has imported it; others need not wait for it.
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
