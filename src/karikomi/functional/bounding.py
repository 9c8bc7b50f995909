"""Bound named weights in a form that can be traced: no branch on a value, no item assignment."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from karikomi.bound.entries import UNGIVEN
from karikomi.bound.standing import standing
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.functional.library import Library
from karikomi.functional.norms import Axes
from karikomi.functional.projections import nearest_points
from karikomi.functional.unit_axes import Shapes
from karikomi.rule import Array, Composite, Quantity, Rule, Scope, State, order_of
from karikomi.rules import decide
from karikomi.rules.stages import Stage, alone

MEASURED = ("fan_in", "negative_part", "distance")
"""What rules on weights may need here besides norms."""


@dataclass(frozen=True)
class BoundPlan:
    """Which arrays a rule bounds, and how they are measured.

    `counts`: how many numbers each has. `axes`: the unit axes of those that are measured by unit.
    `left_alone`: name -> why. `shapes`: those of all arrays.
    """

    rule: Rule
    counts: dict[str, int]
    axes: dict[str, Axes]
    fan_in: dict[str, float]
    left_alone: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    @property
    def stage(self) -> Stage:
        """The rule for all its numbers."""
        return alone(self.rule, [name for name, count in self.counts.items() for _ in range(count)])


class Bounded(NamedTuple):
    """The result of one step: arrays, the state after it, and numbers in the order of the plan's stage."""

    arrays: dict[str, Array]
    state: State
    norms: Array
    after: Array
    factor: Array
    limit: Array | None


def plan_bound(
    rule: Rule,
    shapes: Shapes,
    axes: Mapping[str, Axes],
    fan_in: Mapping[str, float],
    *,
    left_alone: Mapping[str, str] | None = None,
    where: str,
) -> BoundPlan:
    """Return the plan of a rule for arrays of these shapes, or raise `InvalidArgument` where it bounds none.

    `left_alone`: name -> why this array is not bounded, whatever its shape.
    """
    reasons = dict(left_alone or {})
    unit_axes: dict[str, Axes] = {}
    if rule.scope is Scope.UNIT:
        reasons = {n: "has no unit axis" for n in shapes if n not in axes} | reasons
        unit_axes = {name: axes[name] for name in shapes if name not in reasons}
    elif "fan_in" in rule.needs:
        reasons = {n: "has no fan-in" for n in shapes if n not in fan_in} | reasons
    elif hasattr(rule, "given_for"):
        rule.check_names(shapes)  # type: ignore[attr-defined]
        given = rule.given_for(shapes)  # type: ignore[attr-defined]
        reasons = {name: UNGIVEN for name in shapes if name not in given} | reasons
    concerned = [name for name in shapes if name not in reasons]
    if not concerned:
        raise InvalidArgument(
            "no tensor to bound",
            where=where,
            got="; ".join(dict.fromkeys(f"{n}: {reasons[n]}" for n in list(shapes)[:3])),
            hint="name them: unit_axes={'*kernel': -1}, fan_in={'*kernel': 784}, only='*'",
        )
    counts = {
        name: math.prod(shapes[name][axis] for axis in unit_axes.get(name, ()))
        for name in concerned
    }
    reasons = {name: reasons[name] for name in shapes if name in reasons}
    return BoundPlan(rule, counts, unit_axes, dict(fan_in), reasons, dict(shapes))


def fresh_bound_state(plan: BoundPlan, *, library: Library) -> State:
    """Return the state of a bound before its first step."""
    vector = library.constants([0.0] * sum(plan.counts.values()))
    return decide.begin_stages([plan.stage], [vector], xp=library.xp)


def bound_named(
    plan: BoundPlan, weights: Mapping[str, Array], state: State, *, library: Library
) -> Bounded:
    """Return the result of a plan for these weights; others, and those that are not finite, are unchanged."""
    xp, stage = library.xp, plan.stage
    points: dict[str, Array] = {}
    if "distance" in plan.rule.needs:
        concerned = {name: weights[name] for name in plan.counts}
        points = nearest_points(
            plan.rule, concerned, plan.axes, attempted=state["attempted"], library=library
        )
    norms = library.vector(
        [_measured(plan, name, weights[name], points.get(name), library) for name in plan.counts]
    )
    facts = {}
    if "fan_in" in plan.rule.needs:
        facts["fan_in"] = library.constants([plan.fan_in[name] for name in stage.owners])
    decision, learned = decide.decide_stage(
        stage, norms, state, present=xp.isfinite(norms), xp=xp, nonfinite="pass", facts=facts
    )
    if decision.limit is not None:
        dtypes = [weights[name].dtype for name in stage.owners]
        decision = decision._replace(limit=library.representable(decision.limit, dtypes))
    after = decide.committed(
        state, learned, skip=decision.skip, any_bad=xp.any(~xp.isfinite(norms)), xp=xp
    )
    arrays, start = dict(weights), 0
    for name, count in plan.counts.items():
        part = slice(start, start + count)
        start = part.stop
        array = weights[name]
        if name in points:
            moved = _as_units(plan, name, decision.factor[part] == 0, library)
            arrays[name] = xp.where(moved, xp.astype(points[name], array.dtype), array)
        else:
            arrays[name] = _applied(plan, name, array, decision, part, library)
    settled = {key: xp.astype(value, state[key].dtype) for key, value in after.items()}
    left = decide.norms_after(norms, decision, xp=xp)
    return Bounded(arrays, settled, norms, left, decision.factor, decision.limit)


def check_bound(rule: Any, *, where: str) -> None:
    """Raise an error unless this is one rule on weights whose facts are measured here."""
    decide.check_rule(rule, Quantity.WEIGHT, where=where, available=MEASURED)
    if isinstance(rule, Composite):
        raise Unsupported("bounds are applied one at a time", where=where, got=type(rule).__name__)


def share_at_bound(
    plan: BoundPlan,
    done: Bounded,
    *,
    attempted: int = 0,
    host: Callable[[Array], np.ndarray] = np.asarray,
) -> float:
    """Return the share of units, or of entries, that are at the bound after a step.

    `attempted`: the number of steps before it. `host`: returns an array as one of NumPy.
    """
    if "negative_part" in plan.rule.needs:
        flags = [done.arrays[name] <= 0 for name in plan.counts]
    elif done.limit is not None:
        limits = zip(plan.counts, host(done.limit).tolist(), strict=True)
        flags = [abs(done.arrays[name]) >= limit for name, limit in limits]
    else:
        after, factor = (host(numbers).astype(np.float64) for numbers in (done.after, done.factor))
        return float(standing(plan.rule, after, factor, attempted=attempted).mean())
    # Counted on the device where arrays have the method.
    reached = [flag if hasattr(flag, "sum") else host(flag) for flag in flags]
    size = sum(math.prod(flag.shape) for flag in reached)
    return sum(int(flag.sum()) for flag in reached) / max(size, 1)


def _measured(
    plan: BoundPlan, name: str, array: Array, point: Array | None, library: Library
) -> Array:
    order = order_of(plan.rule)
    if point is not None:
        array = library.widened(array) - library.widened(point)
    if name in plan.axes:
        return library.unit_norms(array, plan.axes[name], order)
    if "negative_part" in plan.rule.needs:
        return library.widened(library.depth(array))
    if plan.rule.scope is Scope.ELEMENT:
        return library.widened(library.peak(array))
    return library.norm_vector([array], order)[0]


def _as_units(plan: BoundPlan, name: str, flags: Array, library: Library) -> Array:
    """Return numbers of an array, one or one per unit, in a shape that goes with its entries."""
    if name not in plan.axes:
        return flags[0]
    axes, shape = plan.axes[name], plan.shapes[name]
    own = [length if axis in axes else 1 for axis, length in enumerate(shape)]
    return library.xp.reshape(flags, own)


def _applied(
    plan: BoundPlan,
    name: str,
    array: Array,
    decision: decide.StageDecision,
    part: slice,
    library: Library,
) -> Array:
    if decision.limit is not None:
        return library.clamped(array, decision.limit[part][0])
    factors = decision.factor[part]
    if name in plan.axes:
        return library.scaled_units(array, factors, plan.axes[name])
    if "negative_part" in plan.rule.needs:
        return library.scaled_below_zero(array, factors[0])
    return library.scaled([array], factors)[0]
