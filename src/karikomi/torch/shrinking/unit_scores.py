"""Scores of the units of a group, out of all weights that they are found in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.errors import NonFinite, Unsupported
from karikomi.prune.facts import PER_UNIT, measured_on
from karikomi.prune.scores.score import Score
from karikomi.selection.granularity import whole_fact
from karikomi.selection.weight_source import Source, with_noise
from karikomi.shrink.groups import Group
from karikomi.shrink.labels import Block
from karikomi.torch.facts.measure import measure
from karikomi.torch.modules.prunable import layouts
from karikomi.torch.pruning.weight_sources import sources_of

WHERE = "torch.shrink"
Part = tuple[Block, np.ndarray, Source]


def unit_scores(
    module: nn.Module,
    groups: Sequence[Group],
    score: Score,
    *,
    data: Iterable[Any] | None,
    loss: Any,
) -> list[np.ndarray]:
    """Return one score per unit of each group, over all weights that the units are found in; over vectors if there are no others.

    A score of units is the mean over the layers whose outputs they are. Raises `Unsupported` for a score that
    re-fits weights, or that is defined for no weight of a group.
    """
    if score.updates:
        raise Unsupported(
            f"{type(score).__name__} re-fits single weights, not units",
            where=f"{WHERE}: score",
            hint="compensate=True re-fits what reads the removed units",
        )
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
    if score.needs & measured_on("seed"):
        seed = getattr(score, "seed", 0)
        sources = {name: with_noise(source, seed) for name, source in sources.items()}
    return [_scored(group, score, sources, axes, measured) for group in groups]


def _scored(
    group: Group,
    score: Score,
    sources: Mapping[str, Source],
    axes: Mapping[str, Any],
    measured: frozenset[str],
) -> np.ndarray:
    parts = [
        (block, places, sources[block.owner])
        for block, places in group.members
        if block.owner in sources and measured <= {*sources[block.owner].facts, *PER_UNIT}
    ]
    if score.of_units_only or score.needs & PER_UNIT:
        parts = [
            part
            for part in parts
            if part[0].owner in axes and axes[part[0].owner].units == part[0].axis
        ]
        found = [_of_groups(score, [part]) for part in parts]
        result = np.mean(found, axis=0) if found else None
    else:
        result = _of_groups(score, parts) if parts else None
    if result is None:
        raise Unsupported(
            f"{type(score).__name__} is not defined for these units",
            where=group.name,
            hint='score="magnitude" is defined for all; exclude= leaves them alone',
        )
    if not np.isfinite(result).all():
        raise NonFinite("the score of a unit is NaN or infinite", where=group.name)
    return result


def _of_groups(score: Score, parts: Sequence[Part]) -> np.ndarray:
    weights = np.concatenate([_rows(s.array(), block.axis, p) for block, p, s in parts], axis=1)
    facts: dict[str, np.ndarray] = {}
    for name in score.needs:
        if name in PER_UNIT:
            (block, places, source), *_ = parts
            facts[name] = np.asarray(source.facts[name], np.float64)[places].mean(axis=1)
        else:
            facts[name] = np.concatenate(
                [_rows(whole_fact(s, name), block.axis, p) for block, p, s in parts], axis=1
            )
    with np.errstate(over="ignore"):
        return np.asarray(score.of_groups(weights, facts, xp=np), np.float64)


def _rows(array: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """Return the entries of each unit as a row."""
    moved = np.moveaxis(np.asarray(array, np.float64), axis, 0)
    return moved[places].reshape(len(places), -1)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters and buffers by name, a shared one under each of its names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
