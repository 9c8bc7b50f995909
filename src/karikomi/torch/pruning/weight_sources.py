"""Hand a module's weights over to the selection: as views where they lie on the host, else in blocks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.errors import UnknownName, Unsupported, suggest
from karikomi.prune import (
    FACTS,
    Coupled,
    Heads,
    Layers,
    Layout,
    Member,
    Pattern,
    Score,
    Units,
    Unstructured,
)
from karikomi.prune.allocations.owl import outlier_share
from karikomi.selection import block_scores
from karikomi.selection.weight_source import Source
from karikomi.torch.distributed.dtensors import local
from karikomi.torch.modules.parameters import unwrapped
from karikomi.torch.modules.prunable import layouts, prunable, siblings
from karikomi.torch.pruning.head_groups import coupled_heads
from karikomi.torch.pruning.mask_shards import part_of

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
        facts=own,
        macs=float(facts.get("macs", {}).get(name, unknown)) / max(weight.numel(), 1),
        itemsize=weight.element_size(),
    )


def on_host(tensor: Any) -> np.ndarray:
    """Return a tensor as a NumPy array: a view where there can be one."""
    if not isinstance(tensor, torch.Tensor):
        return np.asarray(tensor)
    tensor = tensor.detach()
    return (tensor if tensor.dtype in _OF_NUMPY else tensor.float()).cpu().numpy()


def outlying(weight: torch.Tensor, norm: Any) -> float:
    """Return the share of ``|w| * input norm`` that stands out (Yin et al. 2024), row by row."""
    norms = np.broadcast_to(on_host(norm), weight.shape)

    def metrics() -> Iterator[np.ndarray]:
        for row, own in zip(weight.detach(), norms, strict=True):
            yield np.abs(on_host(row)).astype(np.float32) * own

    return outlier_share(metrics)


def coupled_in(
    module: nn.Module,
    pattern: Pattern,
    weights: Mapping[str, torch.Tensor],
    norms: Mapping[str, str],
    spared: Collection[str] = (),
) -> tuple[list[Coupled], dict[str, str]]:
    """Return ``(what goes together, parameter -> why it has no such items)`` for a pattern.

    `weights`: what may go, by name. `norms`: layer name -> name of the normalisation that follows it.
    `spared`: biases, scales and shifts that do not go with their units.
    """
    if isinstance(pattern, Heads):
        return coupled_heads(module, weights)
    axes = layouts(module)
    found, left_alone = [], {}
    along = {
        name: [sibling for sibling in siblings(module, name, norms) if sibling not in spared]
        for name in weights
    }
    taken = {item for several in along.values() for item in several}
    for name, weight in weights.items():
        if isinstance(pattern, Units) and name in taken:
            left_alone[name] = "it goes with the units that it scales"
        elif isinstance(pattern, Layers):
            members = [Member(name, 0, size=0)]
            members += [Member(item, 0, size=0, scored=False) for item in along[name]]
            found.append(Coupled(name, 1, tuple(members)))
        elif isinstance(pattern, Units) and name in axes:
            axis = axes[name].units
            members = [Member(name, axis)]
            members += [Member(item, 0, scored=False) for item in along[name]]
            found.append(Coupled(name, weight.shape[axis], tuple(members)))
        elif isinstance(pattern, Units):
            left_alone[name] = "which axis are its units is not known"
    if pattern.coupled and not found:
        raise Unsupported(
            f"nothing of this goes as {type(pattern).__name__.lower()}", where="torch.prune_"
        )
    return found, left_alone


def members_of(module: nn.Module, coupled: list[Coupled]) -> dict[str, torch.Tensor]:
    """Return the parameters that the groups take part of, in the order of the module."""
    wanted = {member.name for item in coupled for member in item.members}
    return {
        name: parameter
        for name, parameter in unwrapped(module).named_parameters()
        if name in wanted
    }


def totals_of(module: nn.Module, facts: Facts) -> dict[str, float]:
    """Return the whole module's parameters, bytes and, if they were measured, multiply-accumulates."""
    parameters = [
        parameter
        for parameter in unwrapped(module).parameters()
        if not isinstance(parameter, nn.UninitializedParameter)
    ]
    totals = {
        "parameters": float(sum(parameter.numel() for parameter in parameters)),
        "bytes": float(
            sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        ),
    }
    if "macs" in facts:
        totals["macs"] = float(sum(facts["macs"].values()))
    return totals


def counted(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights whose multiply-accumulates are those of a module: of layers and attention."""
    return prunable(module, ("norms", "recurrent"))[0]


def with_axes(
    module: nn.Module, weights: Mapping[str, torch.Tensor], pattern: Pattern, score: Score
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return ``(weights that have the axes of which a pattern or score speaks, why the others do not)``.

    Raises `Unsupported` if none has.
    """
    by_rows = score.within_rows or score.updates
    if isinstance(pattern, Unstructured) and not by_rows:
        return dict(weights), {}
    axes, left_alone = layouts(module), {}
    for name in weights:
        if name not in axes:
            left_alone[name] = "which axis are its units is not known"
        elif axes[name].inputs is None:
            left_alone[name] = "it has no axis of inputs"
    if len(left_alone) == len(weights):
        name, why = next(iter(left_alone.items()))
        raise Unsupported("no weight has the axes that are needed", where=name, got=why)
    return {name: weight for name, weight in weights.items() if name not in left_alone}, left_alone


def check_facts(module: nn.Module, facts: Facts, score: Score) -> None:
    """Raise `UnknownName` for facts that there are not, and of parameters that the module has not."""
    known = {*FACTS, *score.needs, "macs", "outliers", "curve"}
    parameters = dict(unwrapped(module).named_parameters(remove_duplicate=False))
    for fact, of in facts.items():
        if fact not in known:
            raise UnknownName(
                "unknown fact", where="facts", got=repr(fact), hint=suggest(fact, known)
            )
        for name in of:
            if name not in parameters:
                raise UnknownName(
                    "the module has no such parameter",
                    where=f"facts[{fact!r}]",
                    got=repr(name),
                    hint=suggest(name, parameters),
                )


def _blocks(weight: torch.Tensor) -> Iterator[np.ndarray]:
    """Yield a tensor's entries in index order as float32 blocks on the host, whatever its strides."""
    if weight.is_contiguous() or weight.numel() <= block_scores.BLOCK:
        for block in weight.detach().reshape(-1).split(block_scores.BLOCK):
            yield block.float().cpu().numpy()
    else:
        for part in weight:
            yield from _blocks(part)
