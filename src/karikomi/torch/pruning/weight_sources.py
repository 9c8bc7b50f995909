"""The weights of a module as sources of the selection: views of host memory, else copied in blocks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from karikomi.prune import Coupled, Heads, Layout
from karikomi.prune.facts import Facts
from karikomi.selection import block_scores
from karikomi.selection.request import PruneRequest, facts_of
from karikomi.selection.weight_source import Source
from karikomi.torch.distributed.dtensors import local
from karikomi.torch.modules.prunable import layouts, siblings
from karikomi.torch.pruning.head_groups import coupled_heads
from karikomi.torch.pruning.mask_shards import part_of

_OF_NUMPY = (torch.float16, torch.float32, torch.float64)


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
    # Biases and scales of units take part in no product that is counted.
    unknown = math.nan if weight.dim() > 1 else 0.0
    here = local(weight)
    on_cpu = here.device.type == "cpu" and here.dtype in _OF_NUMPY
    return Source(
        name=name,
        shape=tuple(here.shape),
        array=lambda: on_host(here),
        blocks=None if on_cpu else lambda: _blocks(here),
        part=part_of(weight),
        layout=layout,
        facts={fact: on_host(values) for fact, values in facts_of(name, facts).items()},
        macs=float(facts.get("macs", {}).get(name, unknown)) / max(weight.numel(), 1),
        itemsize=weight.element_size(),
    )


def on_host(tensor: Any) -> np.ndarray:
    """Return a tensor as a NumPy array, a view if possible."""
    if not isinstance(tensor, torch.Tensor):
        return np.asarray(tensor)
    tensor = tensor.detach()
    return (tensor if tensor.dtype in _OF_NUMPY else tensor.float()).cpu().numpy()


def coupled_in(
    module: nn.Module,
    request: PruneRequest,
    weights: Mapping[str, torch.Tensor],
    norms: Mapping[str, str],
    spared: Collection[str] = (),
) -> tuple[list[Coupled], dict[str, str]]:
    """Return ``(groups that are pruned as one, parameter -> why it is in none)``.

    `weights`: what may be pruned. `norms`: layer name -> name of the normalisation that follows it.
    `spared`: biases, scales and shifts that do not go with their units.
    """
    if isinstance(request.pattern, Heads):
        return coupled_heads(module, weights)
    beside = {
        name: [sibling for sibling in siblings(module, name, norms) if sibling not in spared]
        for name in weights
    }
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return request.grouped(shapes, layouts(module), beside)


def members_of(module: nn.Module, coupled: list[Coupled]) -> dict[str, torch.Tensor]:
    """Return the parameters that the groups contain parts of, in the order of the module."""
    wanted = {member.name for group in coupled for member in group.members}
    return {name: parameter for name, parameter in module.named_parameters() if name in wanted}


def sizes_of(module: nn.Module) -> list[tuple[int, int]]:
    """Return the entries and the bytes per entry of each parameter of a module."""
    return [
        (parameter.numel(), parameter.element_size())
        for parameter in module.parameters()
        if not is_lazy(parameter)
    ]


def _blocks(weight: torch.Tensor) -> Iterator[np.ndarray]:
    """Yield a tensor's entries in index order as float32 blocks on the host, whatever its strides."""
    if weight.is_contiguous() or weight.numel() <= block_scores.BLOCK:
        for block in weight.detach().reshape(-1).split(block_scores.BLOCK):
            yield block.float().cpu().numpy()
    else:
        for part in weight:
            yield from _blocks(part)
