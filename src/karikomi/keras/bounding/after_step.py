"""A bound on the weights that an optimizer writes, applied after each of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from karikomi.bound import spared
from karikomi.functional.bounding import BoundPlan, bound_named, fresh_bound_state, plan_bound
from karikomi.functional.library import Library
from karikomi.functional.unit_axes import Shapes, UnitAxes, resolved_axes, resolved_fan_ins
from karikomi.keras.arrays.library import readable
from karikomi.keras.clipping.named_clip import LAST
from karikomi.rule import Array, Rule, Scope, State, order_of
from karikomi.rules.outcome import Outcome


@dataclass(frozen=True)
class StandingBound:
    """A rule for weights of these names and shapes."""

    plan: BoundPlan

    def fresh(self, library: Library) -> State:
        """Return the state before the first step."""
        state = fresh_bound_state(self.plan, library=library)
        shape = (2, sum(self.plan.counts.values()))
        return state | {LAST: library.xp.zeros(shape, dtype=library.wide)}

    def step(
        self, weights: Mapping[str, Array], state: State, library: Library
    ) -> tuple[dict[str, Array], State]:
        """Return the bounded weights of the rule, and the state after the step."""
        own = {key: value for key, value in state.items() if key != LAST}
        done = bound_named(self.plan, weights, own, library=library)
        numbers = [library.xp.reshape(norm, (1, -1)) for norm in (done.norms, done.after)]
        after = done.state | {LAST: library.xp.concat(numbers)}
        return {name: done.arrays[name] for name in self.plan.counts}, after

    def outcome(self, state: State) -> Outcome:
        """Return what happened in the step that left this state."""
        norms, after = np.asarray(readable(state[LAST]), np.float64)
        return Outcome(
            names=self.plan.stage.owners,
            norms=norms,
            after=after,
            skipped=False,
            element_wise=self.plan.rule.scope is Scope.ELEMENT,
            left_alone=self.plan.left_alone,
            order=order_of(self.plan.rule),
        )


def bound_for(
    rule: Rule,
    shapes: Shapes,
    unit_axes: UnitAxes | None,
    fan_in: Mapping[str, int] | None,
    *,
    only: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    where: str,
) -> StandingBound:
    """Return a bound for those weights of these names and shapes that are selected."""
    axes = resolved_axes(unit_axes, shapes, where=where)
    inputs = resolved_fan_ins(fan_in, shapes, where=where)
    gains = spared.by_name(shapes) if spared.spares(rule, only) else {}
    others = spared.left_alone(shapes, gains, only=only, exclude=exclude, where=where)
    return StandingBound(plan_bound(rule, shapes, axes, inputs, left_alone=others, where=where))
