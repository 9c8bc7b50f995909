"""Layout of DTensors on their meshes: local part, units, copies, and ranks that share them. Without collectives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from karikomi.errors import Unsupported


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local part of a tensor; a plain tensor is returned unchanged."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a DTensor, replicated ones among them."""
    return hasattr(tensor, "device_mesh")


@dataclass(frozen=True, slots=True)
class Joint:
    """DTensors over one set of ranks: the groups to reduce over in turn, name -> 1 / copies of an entry."""

    over: tuple[int, ...]
    groups: tuple[Any, ...]
    shares: dict[str, float]


def own_units(tensor: torch.Tensor, axis: int) -> slice:
    """Return which units along an axis are on this rank, split as by `torch.chunk`.

    FSDP splits what tensor parallelism has split before, although its mesh dimension comes first.
    """
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    splits = [
        (getattr(placement, "split_factor", 1), size, place)
        for placement, size, place in zip(
            placements, mesh.shape, mesh.get_coordinate(), strict=True
        )
        if getattr(placement, "dim", None) == axis
    ]
    start, length, done, as_fsdp = 0, tensor.shape[axis], 1, True
    for factor, size, place in sorted(splits, key=lambda split: split[0]):
        most = math.ceil(length / size)
        offset = min(length, most * place)
        start, length = start + offset, min(most, length - offset)
        as_fsdp = as_fsdp and factor in (1, done)
        done *= size
    if not as_fsdp or length != local(tensor).shape[axis]:
        raise Unsupported(
            "the units of this rank are not side by side",
            where=f"sharded {tuple(tensor.shape)}, {placements}",
            hint="use a rule by tensor",
        )
    return slice(start, start + length)


def joints(found: Mapping[str, torch.Tensor], *, copied: bool = False) -> list[Joint]:
    """Return the sets of ranks that share tensors, in one order on all ranks, smaller sets first.

    `copied`: whole copies are shared too. Raises `Unsupported` for a mesh without this rank.
    """
    by_ranks: dict[tuple[int, ...], Joint] = {}
    for name, tensor in found.items():
        if not is_sharded(tensor):
            continue
        mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
        if mesh.get_coordinate() is None:
            raise Unsupported(
                "this rank is not in the mesh of the parameter",
                where=name,
                hint="give each rank the parameters that it holds, and process_group=",
            )
        copies = copies_of(tensor)
        if copied or copies < mesh.size():
            over = ranks_of(mesh)
            joint = by_ranks.setdefault(over, Joint(over, _mesh_groups(mesh), {}))
            joint.shares[name] = 1.0 / copies
    # One order on all ranks, so that collectives of overlapping sets of ranks cannot deadlock.
    return [by_ranks[over] for over in sorted(by_ranks, key=lambda over: (len(over), over))]


def copies_of(tensor: Any) -> int:
    """Return on how many ranks each entry of a DTensor is stored."""
    pairs = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in pairs if not hasattr(placement, "dim"))


@lru_cache(maxsize=8)
def ranks_of(mesh: Any) -> tuple[int, ...]:
    """Return the ranks of a mesh, in order."""
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def _mesh_groups(mesh: Any) -> tuple[Any, ...]:
    if mesh.ndim > 1 and mesh.size() == dist.get_world_size():
        return (dist.group.WORLD,)
    # A sum over the dimensions one by one is the sum over all, without another group.
    return tuple(mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1)
