"""One rule for named arrays: its plan, its state with the numbers of the last step, and their outcome.

Shared by hand-written loops, with the state in a dict, and optimizers, with the state in variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from karikomi.errors import Unsupported
from karikomi.functional.clipping import Companions, StepResult, clip_named, fresh_state
from karikomi.functional.library import Library
from karikomi.functional.outcomes import described, stage_outcome, were_zeroed
from karikomi.functional.unit_axes import UnitAxes, plan_for, resolved_axes
from karikomi.keras.arrays.library import is_known, readable
from karikomi.rule import Array, Composite, Quantity, Rule, State
from karikomi.rules import decide
from karikomi.rules.outcome import Outcome
from karikomi.rules.stages import Stage

LAST, MOMENT, SKIPPED = "last.", "moment.", "skipped"
"""Entries of a state beside those of the rule: numbers of the last step by stage, running means of squares, and
whether the last step is (or was) not to be taken."""


def check_clip(rule: Any, nonfinite: str, *, weights: bool, where: str) -> None:
    """Raise an error unless this is a rule on gradients whose facts are measured, and a known policy."""
    if getattr(rule, "of", None) is Quantity.UPDATE:
        raise Unsupported(
            f"{type(rule).__name__} acts on updates, which no optimizer of Keras shows before it writes them",
            where=where,
            hint="clip gradients, or train with kk.jax.clip or kk.torch.attach",
        )
    if not weights and any("weights" in leaf.needs for leaf in _leaves(rule)):
        raise Unsupported(
            f"{type(rule).__name__} compares gradients with weights",
            where=where,
            hint="pass variables=model.trainable_variables",
        )
    decide.check_rule(
        rule, Quantity.GRADIENT, where=where, available=["second_moment", "sizes", "weights"]
    )
    decide.check_policy(nonfinite, where=where)


@dataclass(frozen=True)
class Clip:
    """A rule for arrays of these names and shapes."""

    rule: Rule | Composite
    nonfinite: str
    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, tuple[int, ...]]
    plan: tuple[Stage, ...]
    needs: frozenset[str]

    def fresh(self, dtypes: Mapping[str, Any], library: Library) -> State:
        """Return the state before the first step; `dtypes`: those of the arrays, by name."""
        state = fresh_state(self.plan, library=library)
        for place, stage in enumerate(self.plan):
            shape = (2, sum(stage.counts))
            state[f"{LAST}{place}"] = library.xp.zeros(shape, dtype=library.wide)
        state[SKIPPED] = library.xp.asarray(False)
        if "second_moment" in self.needs:
            for name, shape in self.shapes.items():
                state[MOMENT + name] = library.xp.zeros(shape, dtype=dtypes[name])
        return state

    def step(
        self,
        found: Mapping[str, Array | None],
        state: State,
        weights: Mapping[str, Array],
        *,
        zero_skipped: bool,
        library: Library,
    ) -> tuple[StepResult, State]:
        """Return clipped gradients, and the whole state after the step."""
        own = {key: value for key, value in state.items() if is_of_rule(key)}
        moments = {k[len(MOMENT) :]: v for k, v in state.items() if k.startswith(MOMENT)}
        passed = clip_named(
            self.plan,
            {name: self._dense_if_asked(name, array) for name, array in found.items()},
            own,
            Companions(self.axes, weights, moments),
            nonfinite=self.nonfinite,
            zero_skipped=zero_skipped,
            library=library,
        )
        after = dict(passed.state)
        for place, stage in enumerate(passed.stages):
            after[f"{LAST}{place}"] = _beside(stage, library)
        after[SKIPPED] = passed.skip
        after |= {MOMENT + name: moment for name, moment in passed.moments.items()}
        return passed, after

    def outcome(self, state: State) -> Outcome:
        """Return the outcome of the step that returned this state."""
        return outcome_of(described(self.plan), state)

    def _dense_if_asked(self, name: str, array: Array) -> Array:
        axes = self.axes.get(name, ())
        rows_only = 0 not in axes or axes == (0,)
        if (
            array is None
            or not hasattr(array, "densified")
            or (rows_only and "second_moment" not in self.needs)
        ):
            return array
        return array.densified()


def clip_for(
    rule: Rule | Composite,
    shapes: Mapping[str, Sequence[int]],
    *,
    nonfinite: str,
    unit_axes: UnitAxes | None,
    where: str,
) -> Clip:
    """Return a rule for arrays of these names and shapes."""
    known = {name: tuple(map(int, shape)) for name, shape in shapes.items()}
    axes = resolved_axes(unit_axes, known, where=where)
    needs = frozenset[str]().union(*(leaf.needs for leaf in decide.leaves(rule)))
    return Clip(rule, nonfinite, known, axes, plan_for(rule, known, axes), needs)


def outcome_of(stages: Sequence[Mapping[str, Any]], state: State) -> Outcome:
    """Return the outcome of the step that returned this state; `stages` as `described` gives them."""
    found: list[Outcome] = []
    for place, stage in enumerate(stages):
        numbers, skipped = state[f"{LAST}{place}"], state[SKIPPED]
        found.append(_stage_outcome(stage, numbers, skipped, tuple(found)))
    return found[-1]


def culprits(stages: Sequence[Mapping[str, Any]], state: State) -> list[str]:
    """Return the names of the arrays that were not finite in the last step."""
    return list(outcome_of(stages, state).nonfinite) if stages else []


def _stage_outcome(
    stage: Mapping[str, Any], numbers: Array, skipped: Array, earlier: tuple[Outcome, ...]
) -> Outcome:
    zeroed = False
    if is_known(numbers):
        norms, after = np.asarray(readable(numbers), np.float64)
        zeroed = were_zeroed(norms, after, skipped=bool(np.asarray(readable(skipped))))
    else:
        norms = after = readable(numbers)
    return stage_outcome(
        stage, norms, after, skipped=readable(skipped), zeroed=zeroed, earlier=earlier
    )


def _beside(stage: Outcome, library: Library) -> Array:
    xp = library.xp
    return xp.concat([xp.reshape(numbers, (1, -1)) for numbers in (stage.norms, stage.after)])


def is_of_rule(key: str) -> bool:
    """Return whether an entry of a state is a counter, or of the state of a rule."""
    return key in decide.COUNTERS or key.startswith(decide.PREFIX)


def _leaves(rule: Any) -> list[Rule]:
    return decide.leaves(rule) if isinstance(rule, Rule | Composite) else []
