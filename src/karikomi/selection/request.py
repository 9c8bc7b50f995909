"""One prune request, from the caller's arguments to the selection: shared by all frameworks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.prune import (
    Coupled,
    Importance,
    Layers,
    Layout,
    Member,
    Pattern,
    Score,
    Target,
    Units,
    Unstructured,
    as_pattern,
    check_sparsity,
    outlier_share,
)
from karikomi.prune.allocations.allocation import Allocation, name_of
from karikomi.prune.facts import PER_TENSOR, Facts, measured_on
from karikomi.prune.protection import BY_DEFAULT, STACKED
from karikomi.prune.schedules.pruning_schedule import PruningSchedule
from karikomi.schedule import whole_from
from karikomi.select import NOT_SELECTED, select, spread
from karikomi.selection.arguments import (
    allocation_of,
    check_by_hand,
    score_and_facts,
    target_for,
)
from karikomi.selection.exact_masks import SelectionRequest, check_combination
from karikomi.selection.granularity import whole_fact
from karikomi.selection.weight_source import Source

Globs = str | Sequence[str] | None

ROUNDINGS = ("up", "nearest")
"""What becomes of a sparsity that whole units or blocks do not meet: the least that is no less, or the nearest."""
NO_SHARE = "no sparsity is given for it"
NO_IMPORTANCE = "no importance is given for it"
NO_UNITS = "which axis are its units is not known"
NO_INPUTS = "it has no axis of inputs"
SCALES_UNITS = "it goes with the units that it scales"


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneRequest:
    """The validated arguments of one call; `where` is the name of the function, for errors.

    `target`: none where the pattern determines how much goes. `rounding`: out of `ROUNDINGS`. `shares`, `counts`: globs
    -> the share, or the number of items, that goes by hand, instead of an allocation. `protect`: kinds of layers that
    are left alone.
    """

    where: str
    score: Score
    pattern: Pattern
    allocation: Allocation
    target: Target | None
    rounding: str = ROUNDINGS[0]
    shares: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)
    only: Globs = None
    exclude: Globs = None
    protect: Collection[str] = BY_DEFAULT

    def chosen(
        self, weights: Iterable[str], left_alone: Mapping[str, str], *, allowed: str
    ) -> tuple[list[str], dict[str, str], dict[str, float]]:
        """Return ``(names that may be pruned, name -> why another is left alone, shares by hand)``.

        `weights`: what could be pruned. `left_alone`: why the others could not. `allowed`: kinds of
        weights, for the error. Raises `Unsupported` if nothing is left, `UnknownName` for a glob.
        """
        names, reasons = selected(
            weights,
            left_alone,
            only=self.only,
            exclude=self.exclude,
            where=self.where,
            allowed=allowed,
        )
        names, without = self.with_importance(names)
        reasons |= without
        shares = self.by_hand(names)
        if shares:
            reasons |= {name: NO_SHARE for name in names if name not in shares}
            names = [name for name in names if name in shares]
        return names, reasons, shares

    def with_importance(self, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Return the names with an ``importance``, if the score takes it, and why the others are left alone."""
        if not isinstance(self.score, Importance):
            return list(names), {}
        given = self.facts.get("importance", {})
        found = [name for name in names if name in given]
        if not found:
            raise InvalidArgument(
                "no selected weight has an importance",
                where=f"{self.where}: importance",
                got=", ".join(list(given)[:3]) or "no array",
                allowed="importance={name: array}, by the names of weights",
            )
        return found, {name: NO_IMPORTANCE for name in names if name not in given}

    def of(self, names: Collection[str]) -> PruneRequest:
        """Return the request with the importances of these weights alone, where more are given."""
        if not isinstance(self.facts, Mapping) or "importance" not in self.facts:
            return self
        own = {n: value for n, value in self.facts["importance"].items() if n in names}
        return replace(self, facts={**self.facts, "importance": own})

    def by_hand(self, names: Iterable[str]) -> dict[str, float]:
        """Return name -> share (float) or number (int) that goes, where given by name or glob; else nothing."""
        names = list(names)
        shares = spread("sparsity", self.shares, names, where=self.where)
        for name, share in shares.items():
            check_sparsity(share, where=f"{self.where}: {name}")
        counts = spread("count", self.counts, names, where=self.where)
        text = "a count is a number of items"
        return {name: float(share) for name, share in shares.items()} | {
            name: whole_from(0, count, text, where=f"{self.where}: count of {name}")
            for name, count in counts.items()
        }

    def rounds(self) -> Iterator[PruneRequest]:
        """Yield one request per round of the score, with the target of that round."""
        for number in range(1, self.score.rounds + 1):
            target = None if self.target is None else self.target.after(number, self.score.rounds)
            yield replace(self, target=target)

    def needs(self) -> frozenset[str]:
        """Return the facts to measure: those of score, allocation and target that were not given."""
        needs = self.score.needs - measured_on("seed") - measured_on("the caller")
        if self._needs_outliers():
            needs |= {"input_norm"}
        if self.target is not None and self.target.unit == "macs":
            needs |= {"macs"}
        return needs - self.facts.keys()

    @property
    def sees_inputs(self) -> bool:
        """Whether what weights multiply has to be seen."""
        by_inputs = {*measured_on("inputs"), "macs"}
        return bool(self.needs() & by_inputs)

    def gathered(self, measure: Callable[[frozenset[str]], Facts]) -> dict[str, Mapping[str, Any]]:
        """Return the facts that were given, and those that `measure` returns for what is missing."""
        needs = self.needs()
        return {**self.facts, **(measure(needs) if needs else {})}

    def grouped(
        self,
        weights: Mapping[str, tuple[int, ...]],
        layouts: Mapping[str, Layout | None],
        beside: Mapping[str, Sequence[str]],
        *,
        axes: Mapping[str, int] | None = None,
        hint: str | None = None,
    ) -> tuple[list[Coupled], dict[str, str]]:
        """Return ``(groups of units or layers, weight -> why it is in none)``.

        `weights`: name -> shape. `beside`: weight -> biases and scales that go with its units. `axes`: where the
        pattern's own axis lies in these shapes, if not in its place; `hint`: for the `Unsupported` that is raised where
        nothing can be grouped.
        """
        groups, left_alone = [], {}
        taken = {name for several in beside.values() for name in several}
        for name, shape in weights.items():
            others, layout = beside.get(name, ()), layouts.get(name)
            if isinstance(self.pattern, Layers):
                members = [Member(name, 0, size=0)]
                members += [Member(other, 0, size=0, scored=False) for other in others]
                groups.append(Coupled(name, 1, tuple(members)))
            elif isinstance(self.pattern, Units) and self.pattern.axis is not None:
                axis = self.pattern.axis if axes is None else axes.get(name, len(shape))
                if -len(shape) <= axis < len(shape):
                    groups.append(Coupled(name, shape[axis], (Member(name, axis),)))
                else:
                    left_alone[name] = f"it has no axis {self.pattern.axis} of its own"
            elif isinstance(self.pattern, Units) and name in taken:
                left_alone[name] = SCALES_UNITS
            elif isinstance(self.pattern, Units) and layout is not None:
                members = [Member(name, layout.units)]
                members += [Member(other, 0, scored=False) for other in others]
                groups.append(Coupled(name, shape[layout.units], tuple(members)))
            else:
                left_alone[name] = NO_UNITS
        if self.pattern.coupled and not groups:
            raise Unsupported(
                f"which weights go together as {type(self.pattern).__name__.lower()} is not known",
                where=self.where,
                got="; ".join(f"{name}: {why}" for name, why in list(left_alone.items())[:3]),
                hint=hint,
            )
        return groups, left_alone

    def without_axes(self, layouts: Mapping[str, Layout | None]) -> dict[str, str]:
        """Return weight -> why it lacks axes that the pattern or score needs; raises `Unsupported` if all lack some."""
        by_rows = self.score.within_rows or self.score.updates
        if isinstance(self.pattern, Unstructured) and not by_rows:
            return {}
        left_alone = {
            name: NO_UNITS if layout is None else NO_INPUTS
            for name, layout in layouts.items()
            if layout is None or layout.inputs is None
        }
        if len(left_alone) == len(layouts):
            name, why = next(iter(left_alone.items()))
            raise Unsupported("no weight has the axes that are needed", where=name, got=why)
        return left_alone

    def selection(
        self,
        sources: Mapping[str, Source],
        facts: Facts,
        *,
        shares: Mapping[str, float],
        coupled: Sequence[Coupled] = (),
        earlier: Mapping[str, np.ndarray] | None = None,
        totals: Mapping[str, float] | None = None,
    ) -> SelectionRequest:
        """Return the request to `find_masks`.

        `facts`: all of them, for those per tensor; the others are in the `sources`. `shares`: by hand.
        `earlier`: masks in the shapes of the sources. `totals`: see `totals_of`.
        """
        outliers = facts.get("outliers", {})
        if self._needs_outliers():
            outliers = {
                name: _outliers(source)
                for name, source in sources.items()
                if "input_norm" in source.facts
            }
        return SelectionRequest(
            sources=sources,
            score=self.score,
            pattern=self.pattern,
            allocation=self.allocation,
            target=self.target,
            rounding=self.rounding,
            coupled=coupled,
            earlier=earlier or {},
            totals=totals or {},
            outliers=outliers,
            curves=facts.get("curve", {}),
            by_hand=shares,
        )

    def notes(self, masks: Mapping[str, Any]) -> tuple[str, ...]:
        """Return what there is to say of the share that went, beside what was asked for."""
        target, sizes = self.target, [np.size(mask) for mask in masks.values()]
        if target is None or target.unit != "sparsity" or isinstance(self.pattern, Unstructured):
            return ()
        share = sum(
            size - int(np.count_nonzero(m)) for size, m in zip(sizes, masks.values(), strict=True)
        )
        share /= max(sum(sizes), 1)
        if math.isclose(share, target.value, rel_tol=0.0, abs_tol=5e-4) or not target.value:
            return ()
        least = "at least" if self.rounding == ROUNDINGS[0] else "nearest to"
        return (
            f"{least} {target.value:g} was asked for; whole {type(self.pattern).__name__.lower()} make it {share:.3g}",
        )

    def _needs_outliers(self) -> bool:
        return name_of(self.allocation) == "owl" and "outliers" not in self.facts


def request_of(
    where: str,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    count: int | Mapping[str, int] | None = None,
    width: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    bytes: float | None = None,
    score: str | Score = "magnitude",
    allocation: Allocation | None = None,
    pattern: str | Pattern = "unstructured",
    rounding: str = ROUNDINGS[0],
    importance: Mapping[str, Any] | None = None,
    facts: Facts | None = None,
    only: Globs = None,
    exclude: Globs = None,
    protect: Collection[str] | None = None,
) -> PruneRequest:
    """Return the arguments of a prune function, validated, with their defaults.

    Raises `InvalidArgument` for a target that is missing or can be read in two ways, `UnknownName` for a
    name, `Unsupported` for a combination that is not defined.

    >>> request = request_of("prune_", width=0.5, score="l2", allocation=None, pattern="units")
    >>> request.allocation, request.target, request.protect[-1]
    ('uniform', Target(unit='width', value=0.5), 'last')
    """
    if rounding not in ROUNDINGS:
        raise InvalidArgument(
            "unknown rounding", where=f"{where}: rounding", got=repr(rounding), allowed=ROUNDINGS
        )
    if rounding != ROUNDINGS[0] and sparsity is None:
        raise InvalidArgument(
            "only a sparsity is rounded; a budget is held, and a width is the nearest number of units",
            where=f"{where}: rounding",
            got=repr(rounding),
            allowed="with sparsity=",
        )
    chosen = as_pattern(pattern)
    scored_by, facts = score_and_facts(score, importance, facts, where=where)
    check_combination(scored_by, chosen)
    check_by_hand(sparsity, count, allocation, where=where)
    if protect is None:
        protect = protected_by(chosen, scored_by)
    return PruneRequest(
        where=where,
        score=scored_by,
        pattern=chosen,
        allocation=allocation_of(allocation, chosen, scored_by),
        target=target_for(
            chosen,
            where,
            sparsity=0.0 if isinstance(sparsity, Mapping) else sparsity,
            count=0 if isinstance(count, Mapping) else count,
            width=width,
            parameters=parameters,
            macs=macs,
            bytes=bytes,
        ),
        rounding=rounding,
        shares=sparsity if isinstance(sparsity, Mapping) else {},
        counts=count if isinstance(count, Mapping) else {},
        facts=facts,
        only=only,
        exclude=exclude,
        protect=protect,
    )


def scoring(
    where: str,
    score: Score,
    pattern: str | Pattern | None,
    *,
    facts: Facts | None = None,
    only: Globs = None,
    exclude: Globs = None,
    protect: Collection[str] | None = None,
) -> PruneRequest:
    """Return a request of scores alone; without a `pattern` of single weights, or of units if the score is of units."""
    if pattern is None:
        pattern = "units" if score.of_units_only else "unstructured"
    chosen = as_pattern(pattern)
    return request_of(
        where,
        sparsity=None if chosen.fixed_share else 0.0,
        score=score,
        pattern=chosen,
        facts=facts,
        only=only,
        exclude=exclude,
        protect=protect,
    )


def protected_by(pattern: Pattern, score: Score) -> tuple[str, ...]:
    """Return the kinds of layers that are left alone where nothing is said."""
    if score.updates:
        # Nothing is re-fitted across gates.
        return (*BY_DEFAULT, *STACKED)
    if not isinstance(pattern, Units | Layers) or (
        isinstance(pattern, Units) and pattern.axis is not None
    ):
        return BY_DEFAULT
    # The units of the last layer are the outputs.
    return (*BY_DEFAULT, *STACKED, "last")


def scheduled(
    where: str,
    schedule: PruningSchedule,
    step: int,
    *,
    facts: Facts | None = None,
    protect: Collection[str] | None = None,
) -> PruneRequest:
    """Return the request of a schedule at a step."""
    return request_of(
        where,
        sparsity=None if schedule.pattern_says else schedule.sparsity_at(step),
        score=schedule.scored_by(),
        allocation=schedule.allocation,
        pattern=schedule.pattern,
        facts=facts,
        only=schedule.only,
        exclude=schedule.exclude,
        protect=protect,
    )


def selected(
    weights: Iterable[str],
    left_alone: Mapping[str, str],
    *,
    only: Globs,
    exclude: Globs,
    where: str,
    allowed: str,
) -> tuple[list[str], dict[str, str]]:
    """Return ``(selected names, name -> why another is left alone)``; see `PruneRequest.chosen`."""
    weights = list(weights)
    matched = select([*weights, *left_alone], only=only, exclude=exclude, where=where)
    names = [name for name in weights if name in set(matched)]
    if not names:
        raise Unsupported(
            "nothing of this can be pruned",
            where=where,
            got="; ".join(f"{name}: {left_alone[name]}" for name in matched[:3]),
            allowed=allowed,
        )
    return names, {**left_alone, **{n: NOT_SELECTED for n in weights if n not in set(names)}}


def check_masks_alone(score: Score, *, where: str) -> None:
    """Raise `Unsupported` for a score that also changes the weights that stay."""
    if score.updates:
        raise Unsupported(
            f"{type(score).__name__} re-fits the weights that stay, by reconstruction",
            where=f"{where}: score",
            allowed='scores that make masks alone, such as "magnitude" or "wanda"',
            hint="kk.torch.prune_ supports it",
        )


def facts_of(name: str, facts: Facts) -> dict[str, Any]:
    """Return fact -> values of one weight, without the facts per tensor."""
    return {fact: of[name] for fact, of in facts.items() if name in of and fact not in PER_TENSOR}


def totals_of(sizes: Iterable[tuple[int, int]], facts: Facts) -> dict[str, float]:
    """Return the parameters, bytes and, if measured, multiply-accumulates of a model.

    `sizes`: entries and bytes per entry of each parameter.

    >>> totals_of([(6, 4), (2, 2)], {})
    {'parameters': 8.0, 'bytes': 28.0}
    """
    sizes = list(sizes)
    totals = {
        "parameters": float(sum(entries for entries, _ in sizes)),
        "bytes": float(sum(entries * itemsize for entries, itemsize in sizes)),
    }
    return totals | ({"macs": float(sum(facts["macs"].values()))} if "macs" in facts else {})


def _outliers(source: Source) -> float:
    """Return the share of ``|w| * input norm`` that stands out (Yin et al. 2024), row by row."""
    norms = whole_fact(source, "input_norm")

    def metrics() -> Iterator[np.ndarray]:
        for row, factors in zip(source.array(), norms, strict=True):
            yield np.abs(row).astype(np.float32) * factors

    return outlier_share(metrics)
