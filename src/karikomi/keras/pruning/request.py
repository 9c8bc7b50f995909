"""A prune request for a Keras model: its weights, groups and facts in, masks out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np

from karikomi.errors import InvalidArgument
from karikomi.keras.facts.layer_calls import check_data
from karikomi.keras.facts.measure import following, measure
from karikomi.keras.layers.prunable import (
    Oriented,
    is_recurrent,
    is_weight,
    oriented,
    prunable,
    siblings,
)
from karikomi.keras.pruning.account import account_of
from karikomi.keras.pruning.head_groups import coupled_heads
from karikomi.keras.pruning.masks import Masks
from karikomi.keras.pruning.variable_matching import places_of
from karikomi.prune import Blocks, Coupled, Heads, Units
from karikomi.prune.facts import PER_UNIT, Facts, check_facts
from karikomi.select import outright
from karikomi.selection.exact_masks import SelectionRequest, find_masks, find_scores
from karikomi.selection.request import PruneRequest, check_masks_alone, facts_of, totals_of
from karikomi.selection.weight_source import Source

WHERE = "keras.prune_"
UNSEEN = "what it multiplies is not seen inside of a loop over steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """A prune request for a model. `frozen`: path -> why it must not change, beside what cannot be pruned."""

    model: Any
    request: PruneRequest
    data: Iterable[Any] | None = None
    loss: Any = None
    frozen: Mapping[str, str] = field(default_factory=dict)

    def chosen(self) -> tuple[dict[str, Oriented], list[str], dict[str, str], dict[str, float]]:
        """Return all weights, and of them what `PruneRequest.chosen` returns."""
        check_masks_alone(self.request.score, where=WHERE)
        variables = oriented(self.model, where=WHERE)
        found = {name: item for name, item in variables.items() if is_weight(item)}
        check_facts(self.request.facts, self.request.score.needs, found, where=WHERE)
        weights, left_alone = prunable(
            found, self.request.protect, outright(found, self.request.only)
        )
        if self.request.sees_inputs:
            left_alone |= {name: UNSEEN for name in weights if _is_recurrent(found[name])}
        left_alone |= {name: why for name, why in self.frozen.items() if name in found}
        chosen = self.request.chosen(
            [name for name in weights if name not in left_alone],
            left_alone,
            allowed="kernels of Dense, Conv and recurrent layers",
        )
        return found, *chosen

    def find(self, earlier: Masks) -> Masks:
        """Return the masks; the model is left as it is."""
        if self.data is not None:
            check_data(self.data, where=WHERE)
        found, names, left_alone, shares = self.chosen()
        variables = {n: item.variable for n, item in oriented(self.model, where=WHERE).items()}
        earlier = earlier.renamed(variables)
        selection, others = self._selection(found, names, shares, earlier)
        answer = find_masks(selection)
        answer = replace(
            answer, masks={name: found[name].returned(mask) for name, mask in answer.masks.items()}
        )
        kept = {name: earlier[name] for name in earlier if name not in answer.masks} | answer.masks
        reasons = {**left_alone, **others, **answer.left_alone}
        fitting = {name: mask for name, mask in kept.items() if name in found}
        return Masks(
            kept,
            left_alone={name: why for name, why in reasons.items() if name not in kept},
            account=account_of(self.model, found, fitting, answer, self.data),
            places=places_of(variables),
        )

    def scores(self, earlier: Masks) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Return ``(path -> scores, path -> why there are none)``; of single weights in the variable's shape."""
        if self.data is not None:
            check_data(self.data, where=self.request.where)
        found, names, left_alone, shares = self.chosen()
        selection, others = self._selection(found, names, shares, earlier)
        scores = find_scores(selection)
        if not (self.request.pattern.coupled or isinstance(self.request.pattern, Blocks)):
            scores = {name: found[name].returned(values) for name, values in scores.items()}
        return scores, {n: w for n, w in {**left_alone, **others}.items() if n not in scores}

    def _selection(
        self,
        found: Mapping[str, Oriented],
        names: list[str],
        shares: Mapping[str, float],
        earlier: Masks,
    ) -> tuple[SelectionRequest, dict[str, str]]:
        members, coupled = {name: found[name] for name in names}, []
        if self.request.pattern.coupled:
            coupled, left_alone = self._coupled(found, members)
            wanted = {member.name for group in coupled for member in group.members}
            members = {name: item for name, item in found.items() if name in wanted}
        else:
            layouts = {name: item.layout for name, item in members.items()}
            left_alone = self.request.without_axes(layouts)
            members = {name: item for name, item in members.items() if name not in left_alone}
        scored = {n: item for n, item in members.items() if n in names or len(item.shape) > 1}
        facts = self.request.gathered(
            lambda needs: measure(
                self.model, needs, scored, data=self.data, loss=self.loss, where=self.request.where
            )
        )
        sizes = [(math.prod(item.shape), _itemsize(item)) for item in found.values()]
        selection = self.request.selection(
            {name: _source(item, facts) for name, item in members.items()},
            facts,
            shares=shares,
            coupled=coupled,
            earlier={
                name: _earlier(earlier[name], item)
                for name, item in members.items()
                if name in earlier
            },
            totals=totals_of(sizes, facts),
        )
        return selection, left_alone

    def _coupled(
        self, found: Mapping[str, Oriented], chosen: Mapping[str, Oriented]
    ) -> tuple[list[Coupled], dict[str, str]]:
        """Return ``(groups that are pruned as one, weight -> why it is in none)``."""
        pattern = self.request.pattern
        if isinstance(pattern, Heads):
            return coupled_heads(found, self.model, chosen)
        norms = {}
        if self.data is not None and isinstance(pattern, Units):
            norms = following(self.model, chosen, self.data, where=self.request.where)
        beside = {
            name: [
                sibling
                for sibling in siblings(item, found, norms.get(name))
                if sibling not in self.frozen
            ]
            for name, item in chosen.items()
        }
        shapes = {name: item.shape for name, item in chosen.items()}
        axes = None
        if isinstance(pattern, Units) and pattern.axis is not None:
            axes = {name: item.place_of(pattern.axis) for name, item in chosen.items()}
        layouts = {name: item.layout for name, item in chosen.items()}
        return self.request.grouped(shapes, layouts, beside, axes=axes)


def _is_recurrent(value: Oriented) -> bool:
    return is_recurrent(value.layer, value.variable.name)


def _source(value: Oriented, facts: Facts) -> Source:
    own = {
        fact: np.asarray(of)
        if fact in PER_UNIT
        else value.turned(_whole(np.asarray(of), value, fact))
        for fact, of in facts_of(value.name, facts).items()
    }
    macs = float(facts.get("macs", {}).get(value.name, math.nan))
    return Source(
        name=value.name,
        shape=value.shape,
        array=value.array,
        layout=value.layout,
        facts=own,
        macs=macs / max(math.prod(value.shape), 1),
        itemsize=_itemsize(value),
    )


def _itemsize(value: Oriented) -> int:
    bits = (
        keras.backend.standardize_dtype(value.variable.dtype)
        .removeprefix("b")
        .removeprefix("float")
    )
    return int(bits) // 8


def _whole(values: np.ndarray, value: Oriented, fact: str) -> np.ndarray:
    shape = tuple(map(int, value.variable.shape))
    try:
        return np.broadcast_to(values, shape)
    except ValueError:
        raise InvalidArgument(
            f"the fact {fact!r} does not fit its weight",
            where=value.name,
            got=values.shape,
            allowed=shape,
        ) from None


def _earlier(mask: np.ndarray, value: Oriented) -> np.ndarray:
    if mask.shape != tuple(value.variable.shape):
        raise InvalidArgument(
            "the earlier mask does not fit its variable",
            where=value.name,
            got=mask.shape,
            allowed=tuple(value.variable.shape),
        )
    return np.ascontiguousarray(value.turned(mask))
