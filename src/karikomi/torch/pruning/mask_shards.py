"""Masks of sharded weights: the place of a rank's part in the whole tensor, and joining masks of all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.selection.shard import Shard
from karikomi.torch.distributed import collectives
from karikomi.torch.distributed.dtensors import is_sharded, local, own_units


class ShardPlace(NamedTuple):
    """The place of a rectangle in a tensor: the shape of the tensor, and the offset along each axis."""

    whole: tuple[int, ...]
    offsets: tuple[int, ...]

    def of(self, shape: Iterable[int]) -> tuple[slice, ...]:
        """Return the slices of a rectangle of this shape."""
        return tuple(slice(at, at + n) for at, n in zip(self.offsets, shape, strict=True))


def place_of(tensor: torch.Tensor) -> ShardPlace | None:
    """Return the place of this rank's part of a DTensor, ``None`` for a tensor that is not split.

    Raises `Unsupported` for parts that are not a rectangle, and for partial sums.
    """
    if not is_sharded(tensor) or len(_over(tensor)) == 1:
        return None
    if any(placement.is_partial() for placement in tensor.placements):  # type: ignore[attr-defined]
        raise Unsupported("the entries of partial sums are not weights", where="sharded")
    try:
        starts = [own_units(tensor, axis).start for axis in range(tensor.dim())]
    except Unsupported as error:
        raise Unsupported(
            "the weights of this rank are not a rectangle", where="sharded", got=error
        ) from error
    return ShardPlace(tuple(tensor.shape), tuple(starts))


def part_of(tensor: torch.Tensor) -> Shard | None:
    """Return this rank's part of a DTensor with the sums over all ranks that share it, else ``None``.

    Replicas are taken to be equal: sums are over one set of parts.
    """
    place = place_of(tensor)
    if place is None:
        return None
    groups = tuple(tensor.device_mesh.get_group(axis) for axis in _axes(tensor))  # type: ignore[attr-defined]
    return Shard(
        whole=place.whole,
        shape=tuple(local(tensor).shape),
        offsets=place.offsets,
        summed=lambda numbers: collectives.summed(groups, numbers),
        over=_over(tensor),
    )


def here(
    name: str, mask: torch.Tensor, place: ShardPlace | None, parameter: torch.Tensor
) -> torch.Tensor:
    """Return the mask of the part of a parameter that is on this rank.

    `place`: of the mask, ``None`` for a whole one. Raises `InvalidArgument` for a mask that does not fit,
    or is of the part of another rank.
    """
    expected, shape = place_of(parameter), tuple(local(parameter).shape)
    if place is None and expected is not None and mask.shape == parameter.shape:
        return mask[expected.of(shape)].contiguous()
    if tuple(mask.shape) != shape or (place is not None and place != expected):
        sharded = expected is not None or place is not None
        raise InvalidArgument(
            "the mask does not fit its parameter",
            where=name,
            got=_format_place(mask.shape, place),
            allowed=_format_place(shape, expected),
            hint="Masks.joined makes whole masks from those of ranks" if sharded else None,
        )
    return mask


def joined(name: str, parts: Iterable[tuple[torch.Tensor, ShardPlace | None]]) -> torch.Tensor:
    """Return a whole mask from those of all parts; raises `InvalidArgument` where one is missing.

    Masks that are whole already, or of the same part (replicas), have to be equal.
    """
    parts = list(parts)
    shape = next((place.whole for _, place in parts if place is not None), parts[0][0].shape)
    whole, covered = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for mask, place in parts:
        place = place or ShardPlace(tuple(mask.shape), (0,) * mask.dim())
        where = place.of(mask.shape)
        if place.whole != tuple(shape):
            raise InvalidArgument("these are masks of different tensors", where=name)
        if not torch.equal(whole[where] & covered[where], mask.cpu() & covered[where]):
            raise InvalidArgument("two masks of the same weights differ", where=name)
        whole[where], covered[where] = mask.cpu(), True
    if not covered.all():
        raise InvalidArgument(
            "the masks of some ranks are missing",
            where=name,
            got=f"{int(covered.count_nonzero())} of {math.prod(shape)} weights",
        )
    return whole


def _axes(tensor: Any) -> list[int]:
    """Return the axes of the mesh along which a tensor is split among several ranks."""
    pairs = enumerate(zip(tensor.placements, tensor.device_mesh.shape, strict=True))
    return [axis for axis, (placement, size) in pairs if hasattr(placement, "dim") and size > 1]


def _over(tensor: Any) -> tuple[int, ...]:
    """Return the ranks that share one copy of a tensor with this one."""
    mesh, split = tensor.device_mesh, _axes(tensor)
    if mesh.get_coordinate() is None:
        raise Unsupported("this rank is not in the mesh of the parameter", where="sharded")
    at = tuple(
        slice(None) if axis in split else place for axis, place in enumerate(mesh.get_coordinate())
    )
    return tuple(sorted(np.ravel(mesh.mesh[at].tolist()).tolist()))


def _format_place(shape: Iterable[int], place: ShardPlace | None) -> str:
    shape = tuple(shape)
    return str(shape) if place is None else f"{shape} of {place.whole} from {place.offsets} on"
