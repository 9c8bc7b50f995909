"""Hand a module's weights over to the selection: as views where they lie on the host, else in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from niwaki.errors import Refused
from niwaki.numpy import scored
from niwaki.numpy.source import Source
from niwaki.prune import Coupled, Heads, Layers, Layout, Member, Pattern, Units
from niwaki.torch.head_groups import coupled_heads
from niwaki.torch.prunable import layouts, siblings
from niwaki.torch.tensors import unwrapped

_OF_NUMPY = (torch.float16, torch.float32, torch.float64)

Facts = Mapping[str, Mapping[str, Any]]


def sources_of(
    module: nn.Module, weights: Mapping[str, torch.Tensor], facts: Facts
) -> dict[str, Source]:
    """Return name -> source of these parameters of a module, with their measured facts."""
    axes = layouts(module)
    return {
        name: source_of(name, weight, axes.get(name), facts) for name, weight in weights.items()
    }


def source_of(name: str, weight: torch.Tensor, layout: Layout | None, facts: Facts) -> Source:
    """Return the source of one parameter."""
    own = {
        fact: on_host(of[name])
        for fact, of in facts.items()
        if name in of and fact not in ("macs", "outliers", "curve")
    }
    on_cpu = weight.device.type == "cpu" and weight.dtype in _OF_NUMPY
    return Source(
        name=name,
        shape=tuple(weight.shape),
        array=lambda: on_host(weight),
        blocks=None if on_cpu else lambda: _blocks(weight),
        layout=layout,
        facts=own,
        macs=float(facts.get("macs", {}).get(name, math.nan)) / max(weight.numel(), 1),
        itemsize=weight.element_size(),
    )


def on_host(tensor: Any) -> np.ndarray:
    """Return a tensor as a NumPy array: a view where there can be one."""
    if not isinstance(tensor, torch.Tensor):
        return np.asarray(tensor)
    tensor = tensor.detach()
    return (tensor if tensor.dtype in _OF_NUMPY else tensor.float()).cpu().numpy()


def coupled_in(
    module: nn.Module,
    pattern: Pattern,
    weights: Mapping[str, torch.Tensor],
    norms: Mapping[str, str],
) -> tuple[list[Coupled], dict[str, str]]:
    """Return ``(what goes together, parameter -> why it has no such items)`` for a pattern.

    `weights`: what may go, by name. `norms`: layer name -> name of the normalisation that follows it.
    """
    if isinstance(pattern, Heads):
        return coupled_heads(module, weights)
    axes = layouts(module)
    found, left_alone = [], {}
    for name, weight in weights.items():
        if isinstance(pattern, Layers):
            members = [Member(name, 0, size=0)]
            members += [Member(one, 0, size=0, scored=False) for one in siblings(module, name, {})]
            found.append(Coupled(name, 1, tuple(members)))
        elif isinstance(pattern, Units) and name in axes:
            axis = axes[name].units
            members = [Member(name, axis)]
            members += [Member(one, 0, scored=False) for one in siblings(module, name, norms)]
            found.append(Coupled(name, weight.shape[axis], tuple(members)))
        elif isinstance(pattern, Units):
            left_alone[name] = "which axis are its units is not known"
    if pattern.coupled and not found:
        raise Refused(
            f"nothing of this goes as {type(pattern).__name__.lower()}", where="torch.prune_"
        )
    return found, left_alone


def members_of(module: nn.Module, coupled: list[Coupled]) -> dict[str, torch.Tensor]:
    """Return the parameters that the groups take part of, in the order of the module."""
    wanted = {member.name for one in coupled for member in one.members}
    return {name: one for name, one in unwrapped(module).named_parameters() if name in wanted}


def totals_of(module: nn.Module, facts: Facts) -> dict[str, float]:
    """Return the whole module's parameters, bytes and, if they were measured, multiply-accumulates."""
    parameters = list(unwrapped(module).parameters())
    totals = {
        "parameters": float(sum(one.numel() for one in parameters)),
        "bytes": float(sum(one.numel() * one.element_size() for one in parameters)),
    }
    if "macs" in facts:
        totals["macs"] = float(sum(facts["macs"].values()))
    return totals


def _blocks(weight: torch.Tensor) -> Iterator[np.ndarray]:
    """Yield a tensor's entries in index order as float32 blocks on the host, whatever its strides."""
    if weight.is_contiguous() or weight.numel() <= scored.BLOCK:
        for block in weight.detach().reshape(-1).split(scored.BLOCK):
            yield block.float().cpu().numpy()
    else:
        for part in weight:
            yield from _blocks(part)
