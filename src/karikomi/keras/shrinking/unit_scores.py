"""Scores of the units of a Keras model, and the axes along which weights make units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from keras import layers

from karikomi.keras.facts.measure import measure
from karikomi.keras.labelling.kept import WHERE
from karikomi.keras.labelling.label_run import kind_of
from karikomi.keras.labelling.recurrent import GATES
from karikomi.keras.layers.prunable import Oriented, is_recurrent
from karikomi.keras.layers.unit_axes import weights_of
from karikomi.prune.facts import PER_UNIT, measured_on
from karikomi.prune.scores.score import Score
from karikomi.selection.granularity import check_of_units, group_scores
from karikomi.selection.weight_source import source_of
from karikomi.shrink.unit_groups import Group


def unit_scores(
    model: Any,
    groups: Sequence[Group],
    found: Mapping[str, Oriented],
    score: Score,
    *,
    data: Iterable[Any] | None,
    loss: Any,
) -> list[np.ndarray]:
    """Return one score per unit of each group, over all weights (not biases) that the units are found in."""
    check_of_units(score, where=WHERE)
    owners = dict.fromkeys(block.owner for group in groups for block, _ in group.members)
    weights = {name: found[name] for name in owners if len(found[name].variable.shape) > 1}
    measured = score.needs - measured_on("seed")
    facts: Mapping[str, Any] = {}
    if measured:
        weights = {
            name: item
            for name, item in weights.items()
            if item.layout is not None and not is_recurrent(item.layer, item.variable.name)
        }
        facts = measure(model, measured, weights, data=data, loss=loss, where=WHERE)
    sources = {
        name: source_of(
            name,
            item.returned(item.array()),
            facts={
                fact: np.asarray(of[name]) if fact in PER_UNIT else _whole(of[name], item)
                for fact, of in facts.items()
                if name in of
            },
        )
        for name, item in weights.items()
    }
    units = {name: axes[0] for name, axes in made_axes(model, found).items() if len(axes) == 1}
    return group_scores(groups, score, sources, units, measured)


def _whole(values: Any, item: Oriented) -> np.ndarray:
    return np.broadcast_to(np.asarray(values), tuple(map(int, item.variable.shape)))


def made_axes(model: Any, found: Mapping[str, Oriented]) -> dict[str, tuple[int, ...]]:
    """Return name of a weight -> the axes that together name one unit that its layer makes.

    Of an embedding they are its columns, of a recurrent layer the rows that read its own last state.
    """
    known = {id(item.variable): item for item in weights_of(model, where=WHERE)}
    axes = {}
    for name, item in found.items():
        layer, variable = item.layer, item.variable
        if isinstance(layer, layers.Embedding):
            axes[name] = (1,)
        elif kind_of(layer) in GATES:
            if variable.name == "recurrent_kernel":
                axes[name] = (0,)
        elif (own := known[id(variable)].axes) is not None and variable.name != "depthwise_kernel":
            axes[name] = own
    return axes
