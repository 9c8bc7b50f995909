"""One rule for named arrays: its plan, its state with the numbers of the last step, and their outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from karikomi.errors import Unsupported
from karikomi.functional.clipping import Companions, StepResult, clip_named, fresh_state
from karikomi.functional.library import Library
from karikomi.functional.outcomes import described, last_outcome
from karikomi.functional.unit_axes import UnitAxes, axes_for, plan_for
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
    if not weights and any("weights" in leaf.needs for leaf in leaves_of(rule)):
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
            {name: self._dense_if_needed(name, array) for name, array in found.items()},
            own,
            Companions(self.axes, weights, moments),
            nonfinite=self.nonfinite,
            zero_skipped=zero_skipped,
            library=library,
        )
        after = dict(passed.state)
        xp = library.xp
        for place, stage in enumerate(passed.stages):
            rows = [xp.reshape(numbers, (1, -1)) for numbers in (stage.norms, stage.after)]
            after[f"{LAST}{place}"] = xp.concat(rows)
        after[SKIPPED] = passed.skip
        after |= {MOMENT + name: moment for name, moment in passed.moments.items()}
        return passed, after

    def outcome(self, state: State) -> Outcome:
        """Return the outcome of the step that returned this state."""
        found = outcome_of(described(self.plan), state)
        return replace(found, groups=self.plan[0].groups) if self.plan else found

    def _dense_if_needed(self, name: str, array: Array) -> Array:
        axes = self.axes.get(name, ())
        needed = (0 in axes and axes != (0,)) or "second_moment" in self.needs
        return array.densified() if needed and hasattr(array, "densified") else array


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
    axes = axes_for(rule, unit_axes, known, where=where)
    needs = frozenset[str]().union(*(leaf.needs for leaf in decide.leaves(rule)))
    return Clip(rule, nonfinite, known, axes, plan_for(rule, known, axes), needs)


def outcome_of(stages: Sequence[Mapping[str, Any]], state: State) -> Outcome:
    """Return the outcome of the step that returned this state; `stages` as `described` gives them."""
    numbers = [state[f"{LAST}{place}"] for place in range(len(stages))]
    pairs = [
        np.asarray(readable(pair), np.float64) if is_known(pair) else [readable(pair)] * 2
        for pair in numbers
    ]
    return last_outcome(stages, pairs, readable(state[SKIPPED]))


def culprits(stages: Sequence[Mapping[str, Any]], state: State) -> list[str]:
    """Return the names of the arrays that were not finite in the last step."""
    return list(outcome_of(stages, state).nonfinite) if stages else []


def is_of_rule(key: str) -> bool:
    """Return whether an entry of a state is a counter, or of the state of a rule."""
    return key in decide.COUNTERS or key.startswith(decide.PREFIX)


def leaves_of(rule: Any) -> list[Rule]:
    """Return the leaves of a rule, of other objects none."""
    is_rule = isinstance(rule, Rule | Composite) and not isinstance(rule, type)
    return decide.leaves(rule) if is_rule else []
