"""Scores of the units of a group, out of all weights that they are found in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.prune.facts import measured_on
from karikomi.prune.scores.score import Score
from karikomi.selection.granularity import check_of_units, group_scores
from karikomi.shrink.unit_groups import Group
from karikomi.torch.facts.measure import measure
from karikomi.torch.modules.parameters import is_projection
from karikomi.torch.modules.prunable import EMBEDDINGS, NORMS, TRANSPOSED, layouts
from karikomi.torch.pruning.weight_sources import sources_of

WHERE = "torch.shrink"


def unit_scores(
    module: nn.Module,
    groups: Sequence[Group],
    score: Score,
    *,
    data: Iterable[Any] | None,
    loss: Any,
) -> list[np.ndarray]:
    """Return one score per unit of each group, over all weights that the units are found in.

    Over vectors where a group has no others. A score of units is the mean over the layers whose outputs they
    are. Raises `Unsupported` for a score that re-fits weights, or that is defined for no weight of a group.
    """
    check_of_units(score, where=WHERE)
    every = module.named_parameters(remove_duplicate=False)
    named = {name: p.detach().abs() if p.is_complex() else p for name, p in every}
    axes = layouts(module)
    weights: dict[str, torch.Tensor] = {}
    for group in groups:
        own = [named[block.owner] for block, _ in group.members if block.owner in named]
        least = min(2, max(weight.dim() for weight in own))
        for block, _ in group.members:
            if block.owner in named and named[block.owner].dim() >= least:
                weights[block.owner] = named[block.owner]
    measured = score.needs - measured_on("seed")
    if measured:
        weights = {name: weight for name, weight in weights.items() if name in axes}
    facts: Mapping[str, Any] = {}
    if measured:
        facts = measure(module, measured, weights, data=data, loss=loss, where=WHERE)
    sources = sources_of(module, weights, facts)
    units = {name: layout.units for name, layout in axes.items()}
    return group_scores(groups, score, sources, units, measured)


def made_axes(module: nn.Module) -> dict[str, int]:
    """Return name of a weight -> the axis whose indices are the units that its layer makes.

    Of an embedding they are its columns. Vectors and the scales of norms make none: they go with what does.

    >>> made_axes(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)))
    {'0.weight': 1, '1.weight': 0}
    """
    axes = {}
    layers = dict(module.named_modules(remove_duplicate=False))
    for path, own in layers.items():
        # What a parametrized weight is computed from has the axes of the weight.
        layer = layers[path.partition("parametrizations.")[0].rstrip(".")]
        for leaf, tensor in own.named_parameters(recurse=False):
            if tensor.dim() > 1 and not isinstance(layer, NORMS):
                second = isinstance(layer, (*EMBEDDINGS, *TRANSPOSED)) or is_projection(layer)
                axes[f"{path}.{leaf}" if path else leaf] = int(second)
    return axes


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by name, a shared one under each of its names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
