"""Scores of the units of groups, out of all weights that they are found in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from karikomi.errors import NonFinite, Unsupported
from karikomi.prune.facts import PER_UNIT
from karikomi.prune.scores.score import Score
from karikomi.selection.granularity import whole_fact
from karikomi.selection.weight_source import Source, with_noise
from karikomi.shrink.groups import Group
from karikomi.shrink.labels import Block

Part = tuple[Block, np.ndarray, Source]


def check_of_units(score: Score, *, where: str) -> None:
    """Raise `Unsupported` for a score that re-fits weights."""
    if score.updates:
        raise Unsupported(
            f"{type(score).__name__} re-fits single weights, not units",
            where=f"{where}: score",
            hint="compensate=True re-fits what reads the removed units",
        )


def group_scores(
    groups: Sequence[Group],
    score: Score,
    sources: Mapping[str, Source],
    units: Mapping[str, int],
    measured: frozenset[str],
) -> list[np.ndarray]:
    """Return one score per unit of each group, over all weights that the units are found in.

    `sources`: weights by name, in the shape that the labels have. `units`: name -> axis of the units that a
    weight makes. `measured`: facts that a weight must have to count. A score of units is the mean over the layers
    whose outputs they are. Raises `Unsupported` for one that is defined for no weight of a group, `NonFinite`.
    """
    if "noise" in score.needs:
        sources = with_noise(sources, score)
    return [_scored(group, score, sources, units, measured) for group in groups]


def _scored(
    group: Group,
    score: Score,
    sources: Mapping[str, Source],
    units: Mapping[str, int],
    measured: frozenset[str],
) -> np.ndarray:
    parts = [
        (block, places, sources[block.owner])
        for block, places in group.members
        if block.owner in sources and measured <= {*sources[block.owner].facts, *PER_UNIT}
    ]
    if score.of_units_only or score.needs & PER_UNIT:
        found = [
            _of_groups(score, [part]) for part in parts if units.get(part[0].owner) == part[0].axis
        ]
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
            (_, places, source), *_ = parts
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
