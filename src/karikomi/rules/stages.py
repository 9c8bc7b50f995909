"""Rules resolved for named tensors: which rule acts on which tensors, and what is measured in which stage.

A chain or groups of rules become a short list of stages. All parts of a stage are decided from one
measurement; another stage begins only where a later part needs numbers of another kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import cast

import numpy as np

from karikomi.errors import InvalidArgument
from karikomi.rule import Composite, Rule, Scope, is_composite, order_of


class Kind(Enum):
    """What is measured of one tensor: one number, or one per output unit."""

    NORM = "norm"
    UNITS = "unit norms"
    PEAK = "largest magnitude"
    RELATIVE_NORM = "norm in units of sqrt(v)"  # v: the running mean of squares
    RELATIVE_PEAK = "largest magnitude in units of sqrt(v)"


PEAKS = (Kind.PEAK, Kind.RELATIVE_PEAK)
RELATIVE = (Kind.RELATIVE_NORM, Kind.RELATIVE_PEAK)


@dataclass(frozen=True, slots=True)
class Part:
    """One rule that decides by itself, for some of the tensors."""

    rule: Rule
    key: str
    """The prefix of its entries in the state."""
    members: np.ndarray | None
    """One bool per number of its stage; ``None`` means all."""


@dataclass(frozen=True)
class Stage:
    """The rules that are decided from one measurement."""

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    counts: tuple[int, ...]
    """How many numbers each tensor has."""
    parts: tuple[Part, ...]
    groups: tuple[tuple[str, frozenset[str]], ...] = ()
    """The groups of tensors with rules of their own: label and names."""
    order: float = 2.0
    """The p of its norms."""

    @cached_property
    def needs(self) -> frozenset[str]:
        """The facts that its rules need."""
        return frozenset().union(*(part.rule.needs for part in self.parts))

    @cached_property
    def peaks(self) -> frozenset[str]:
        """The tensors whose number is a largest magnitude."""
        pairs = zip(self.names, self.kinds, strict=True)
        return frozenset(name for name, kind in pairs if kind in PEAKS)

    @cached_property
    def element_wise(self) -> bool:
        """Whether its numbers are largest magnitudes, all of them."""
        return all(kind in PEAKS for kind in self.kinds)

    @cached_property
    def norms_only(self) -> bool:
        """Whether one norm of every tensor is measured and nothing else."""
        return self.single and all(kind is Kind.NORM for kind in self.kinds)

    @cached_property
    def owners(self) -> tuple[str, ...]:
        """The name of the tensor of each number."""
        pairs = zip(self.names, self.counts, strict=True)
        return tuple(name for name, count in pairs for _ in range(count))

    @cached_property
    def single(self) -> bool:
        """Whether every tensor has one number."""
        return all(count == 1 for count in self.counts)


def stages(
    rule: Rule | Composite, names: Sequence[str], *, units: Mapping[str, int] | None = None
) -> tuple[Stage, ...]:
    """Return the stages of a rule for these tensors, in order.

    `units`: how many output units a tensor has; one without an entry is a single unit.
    """
    if not names:
        raise InvalidArgument("there is no tensor to act on", where=type(rule).__name__)
    found: list[_Merged] = []
    for leaf in _leaves(rule, names, "", None):
        if not found or not found[-1].takes(leaf):
            found.append(_Merged([None] * len(names)))
            found[-1].takes(leaf)
    if not found:
        raise InvalidArgument(
            "no tensor belongs to a group with a rule", where=type(rule).__name__, got=names[:5]
        )
    labelled = tuple(named_groups(rule, names).items())
    return tuple(_stage(merged, names, units or {}, labelled) for merged in found)


def named_groups(rule: Rule | Composite, names: Sequence[str]) -> dict[str, frozenset[str]]:
    """Return label -> tensors of the groups of a rule; those of several rules of a chain have their place before."""
    own = getattr(rule, "named_groups", None)
    if own is not None:
        return own(names)
    if not is_composite(rule):
        return {}
    found = [(place, named_groups(inner, names)) for place, inner in enumerate(rule.rules)]
    found = [(place, groups) for place, groups in found if groups]
    alone = len(found) == 1
    return {
        label if alone else f"{place}: {label}": own
        for place, groups in found
        for label, own in groups.items()
    }


def alone(rule: Rule, owners: Sequence[str]) -> Stage:
    """Return the stage of one rule for numbers measured at its scope."""
    kind = _kind(rule) or Kind.NORM
    names = tuple(owners)
    parts = (Part(rule, "", None),)
    return Stage(names, (kind,) * len(names), (1,) * len(names), parts, order=order_of(rule))


@dataclass(frozen=True, slots=True)
class _Leaf:
    rule: Rule
    key: str
    members: tuple[bool, ...] | None


def _leaves(
    rule: Rule | Composite, names: Sequence[str], key: str, members: tuple[bool, ...] | None
) -> list[_Leaf]:
    if not is_composite(rule):
        return [_Leaf(cast(Rule, rule), key, members)]
    found = []
    for own_key, inner, chosen in rule.parts(names):
        both = chosen
        if members is not None:
            both = (
                members
                if chosen is None
                else [a and b for a, b in zip(members, chosen, strict=True)]
            )
        found += _leaves(inner, names, f"{key}{own_key}.", None if both is None else tuple(both))
    return found


def _kind(rule: Rule) -> Kind | None:
    """Return the kind of number that a rule needs; ``None``: norms, of tensors or of units."""
    relative = "second_moment" in rule.needs
    if rule.scope is Scope.ELEMENT:
        return Kind.RELATIVE_PEAK if relative else Kind.PEAK
    if relative:
        return Kind.RELATIVE_NORM
    return {Scope.UNIT: Kind.UNITS, Scope.TENSOR: Kind.NORM}.get(rule.scope)


_ANY_NORM = object()  # norms of tensors or of units, once a rule needs some


@dataclass
class _Merged:
    """The rules that share a measurement so far, the kinds of its numbers, and the p of its norms if it has some."""

    kinds: list
    leaves: list[_Leaf] = field(default_factory=list)
    order: float | None = None

    def takes(self, leaf: _Leaf) -> bool:
        """Add a rule, or return false where it needs another measurement."""
        order = None if leaf.rule.scope is Scope.ELEMENT else order_of(leaf.rule)
        kinds = _merged(self.kinds, leaf)
        if kinds is None or None not in (order, self.order) and order != self.order:
            return False
        self.kinds, self.order = kinds, self.order if order is None else order
        self.leaves.append(leaf)
        return True


def _merged(known: Sequence[object], leaf: _Leaf) -> list | None:
    """Return the kinds with those of another rule merged in, or ``None`` where it needs another measurement."""
    wanted = _kind(leaf.rule) or _ANY_NORM
    merged = []
    for place, kind in enumerate(known):
        concerned = leaf.members is None or leaf.members[place]
        if not concerned or kind is wanted:
            merged.append(kind)
        elif kind is None or (kind is _ANY_NORM and wanted in (Kind.NORM, Kind.UNITS)):
            merged.append(wanted)
        elif wanted is _ANY_NORM and kind in (Kind.NORM, Kind.UNITS):
            merged.append(kind)
        else:
            return None
    return merged


def _stage(
    merged: _Merged,
    names: Sequence[str],
    units: Mapping[str, int],
    groups: tuple[tuple[str, frozenset[str]], ...],
) -> Stage:
    settled = tuple(kind if isinstance(kind, Kind) else Kind.NORM for kind in merged.kinds)
    counts = tuple(
        units.get(name, 1) if kind is Kind.UNITS else 1
        for name, kind in zip(names, settled, strict=True)
    )
    parts = tuple(Part(leaf.rule, leaf.key, _mask(leaf.members, counts)) for leaf in merged.leaves)
    return Stage(tuple(names), settled, counts, parts, groups, merged.order or 2.0)


def _mask(members: tuple[bool, ...] | None, counts: tuple[int, ...]) -> np.ndarray | None:
    if members is None or all(members):
        return None
    return np.repeat(np.array(members), counts)
