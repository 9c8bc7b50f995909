"""From a model and what is asked of it to masks: what goes with what, what is measured, what is left alone.

Separate from `prune_`, which checks arguments and writes to the model: schedules ask the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np

from karikomi.errors import InvalidArgument, UnknownName, Unsupported, suggest
from karikomi.keras.facts.layer_calls import check_data
from karikomi.keras.facts.measure import following, measure
from karikomi.keras.layers.prunable import Oriented, is_weight, oriented, prunable, siblings
from karikomi.keras.pruning.account import account_of
from karikomi.keras.pruning.head_groups import coupled_heads
from karikomi.keras.pruning.masks import Masks
from karikomi.keras.pruning.variable_matching import places_of
from karikomi.prune import (
    FACTS,
    Coupled,
    Heads,
    Layers,
    Member,
    Pattern,
    Score,
    Target,
    Units,
)
from karikomi.prune.allocations.owl import outlier_share
from karikomi.prune.facts import PER_UNIT
from karikomi.select import select
from karikomi.selection.exact_masks import SelectionRequest, check_combination, find_masks
from karikomi.selection.weight_source import Source

WHERE = "keras.prune_"
_OF_TENSORS = ("macs", "outliers", "curve")

Facts = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What `prune_` is asked for. `hand`: names -> the share of each by hand, or nothing.

    `frozen`: path -> why it must not change, beside what cannot be pruned anyway.
    """

    model: Any
    score: Score
    pattern: Pattern
    allocation: str
    target: Target | None
    hand: Callable[[list[str]], Mapping[str, float] | None] = lambda names: None
    data: Iterable[Any] | None = None
    loss: Any = None
    facts: Facts = field(default_factory=dict)
    only: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    protect: Collection[str] | None = None
    frozen: Mapping[str, str] = field(default_factory=dict)

    def selected(self) -> tuple[dict[str, Oriented], list[str], dict[str, str]]:
        """Return all weights, the names of those that may go, and name -> why another one may not."""
        check_combination(self.score, self.pattern)
        if self.score.updates:
            raise Unsupported(
                f"{type(self.score).__name__} also changes the weights that stay, by reconstruction",
                where=WHERE,
                hint="kk.torch.prune_, or another score",
            )
        found = {
            n: item for n, item in oriented(self.model, where=WHERE).items() if is_weight(item)
        }
        weights, left_alone = prunable(found, self._protected())
        left_alone |= {name: why for name, why in self.frozen.items() if name in found}
        known = [name for name in weights if name not in left_alone]
        chosen = set(
            select([*known, *left_alone], only=self.only, exclude=self.exclude, where=WHERE)
        )
        names = [name for name in known if name in chosen]
        if not names:
            raise Unsupported(
                "nothing of this can be pruned",
                where=WHERE,
                got="; ".join(f"{name}: {why}" for name, why in list(left_alone.items())[:3]),
                allowed="kernels of Dense and Conv layers",
            )
        left_alone |= {name: "not selected" for name in known if name not in chosen}
        return found, names, left_alone

    def find(self, earlier: Masks) -> Masks:
        """Return the masks; the model is left as it is."""
        if self.data is not None:
            check_data(self.data, where=WHERE)
        found, names, left_alone = self.selected()
        every = {n: item.variable for n, item in oriented(self.model, where=WHERE).items()}
        earlier = earlier.renamed(every)
        hand = self.hand(names)
        if hand:
            left_alone |= {
                name: "no sparsity is given for it" for name in names if name not in hand
            }
            names = [name for name in names if name in hand]
        question, others = self._question(found, names, earlier)
        answer = find_masks(replace(question, by_hand=hand or {}))
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
            places=places_of(every),
        )

    def _protected(self) -> Collection[str]:
        if self.protect is not None:
            return self.protect
        last = ("last",) if isinstance(self.pattern, Units | Layers) else ()
        return ("norms", "embeddings", *last)

    def _question(
        self, found: Mapping[str, Oriented], names: list[str], earlier: Masks
    ) -> tuple[SelectionRequest, dict[str, str]]:
        chosen = {name: found[name] for name in names}
        coupled, left_alone, members = self._coupled(found, chosen)
        facts = self._measured(members, chosen)
        question = SelectionRequest(
            sources={name: _source(member, facts) for name, member in members.items()},
            score=self.score,
            pattern=self.pattern,
            allocation=self.allocation,
            target=self.target,
            coupled=coupled,
            earlier={
                name: _earlier(earlier[name], member)
                for name, member in members.items()
                if name in earlier
            },
            totals=_totals(found, facts),
            outliers=facts.get("outliers", {}),
            curves=facts.get("curve", {}),
        )
        return question, left_alone

    def _coupled(
        self, found: Mapping[str, Oriented], chosen: Mapping[str, Oriented]
    ) -> tuple[list[Coupled], dict[str, str], Mapping[str, Oriented]]:
        """Return what goes together, why some weights belong to nothing, and all that takes part."""
        if not self.pattern.coupled:
            return [], {}, chosen
        left_alone: dict[str, str] = {}
        if isinstance(self.pattern, Heads):
            groups, left_alone = coupled_heads(found, self.model, chosen)
        else:
            groups = self._units_or_layers(found, chosen)
        wanted = {member.name for group in groups for member in group.members}
        return groups, left_alone, {name: item for name, item in found.items() if name in wanted}

    def _units_or_layers(
        self, found: Mapping[str, Oriented], chosen: Mapping[str, Oriented]
    ) -> list[Coupled]:
        whole = isinstance(self.pattern, Layers)
        norms = {}
        if self.data is not None and not whole:
            norms = following(self.model, chosen, self.data, where=WHERE)
        groups = []
        for name, item in chosen.items():
            axis = item.layout.units if item.layout else 0
            size = 0 if whole else 1
            beside = [
                other
                for other in siblings(item, found, norms.get(name))
                if other not in self.frozen
            ]
            members = [Member(name, 0 if whole else axis, size=size)]
            members += [Member(other, 0, size=size, scored=False) for other in beside]
            groups.append(Coupled(name, 1 if whole else item.shape[axis], tuple(members)))
        return groups

    def _measured(
        self, members: Mapping[str, Oriented], chosen: Mapping[str, Oriented]
    ) -> dict[str, Mapping[str, Any]]:
        _check_facts(self.facts, self.score)
        needs = set(self.score.needs) - {"noise"}
        if self.target is not None and self.target.unit == "macs":
            needs.add("macs")
        outliers = self.allocation == "owl" and "outliers" not in self.facts
        needs |= {"input_norm"} if outliers else set()
        needs -= self.facts.keys()
        facts: dict[str, Mapping[str, Any]] = dict(self.facts)
        if needs:
            scored = {
                name: member
                for name, member in members.items()
                if name in chosen or len(member.shape) > 1
            }
            facts |= measure(
                *(self.model, frozenset(needs), scored), data=self.data, loss=self.loss, where=WHERE
            )
        if outliers:
            norms = facts["input_norm"]
            facts["outliers"] = {
                name: _outlying(item, norms[name]) for name, item in chosen.items()
            }
        return facts


def _source(value: Oriented, facts: Facts) -> Source:
    own = {}
    for fact, of in facts.items():
        if fact not in _OF_TENSORS and value.name in of:
            values = np.asarray(of[value.name])
            own[fact] = values if fact in PER_UNIT else value.turned(_whole(values, value, fact))
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


def _totals(found: Mapping[str, Oriented], facts: Facts) -> dict[str, float]:
    sizes = {name: math.prod(item.shape) for name, item in found.items()}
    totals = {
        "parameters": float(sum(sizes.values())),
        "bytes": float(sum(_itemsize(item) * sizes[name] for name, item in found.items())),
    }
    if "macs" in facts:
        totals["macs"] = float(sum(facts["macs"].values()))
    return totals


def _check_facts(facts: Facts, score: Score) -> None:
    allowed = {*FACTS, *_OF_TENSORS, *score.needs}
    for fact in facts:
        if fact not in allowed:
            raise UnknownName(
                "unknown fact", where=WHERE, got=repr(fact), hint=suggest(fact, allowed)
            )


def _outlying(value: Oriented, norms: Any) -> float:
    """Return the share of ``|w| * input norm`` that stands out (Yin et al. 2024)."""
    wide = value.turned(_whole(np.asarray(norms), value, "input_norm"))
    return outlier_share(lambda: [np.abs(value.array()).astype(np.float32) * wide])
