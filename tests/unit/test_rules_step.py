"""The one step loop: what is committed, skipped and counted over several stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

import karikomi as kk
from karikomi.rule import Array, Decision, Namespace, Quantity, Scope, State
from karikomi.rules.checkpoint import to_plain
from karikomi.rules.decide import StageDecision, begin_stages
from karikomi.rules.outcome import Outcome
from karikomi.rules.stages import Stage, stages
from karikomi.rules.step import CompletedStep, run_step


@dataclass(frozen=True)
class Total:
    """Halve every number, add the numbers up, and skip a step with a number above `most`."""

    most: float
    scope: Scope = Scope.TENSOR

    of: ClassVar[Quantity] = Quantity.GRADIENT
    needs: ClassVar[frozenset[str]] = frozenset()

    def init(self, like: Array, *, xp: Namespace) -> State:
        return {"total": xp.zeros_like(like)}

    def decide(
        self,
        norms: Array,
        state: State,
        *,
        present: Array,
        facts: Mapping[str, Array],
        xp: Namespace,
    ) -> tuple[Decision, State]:
        skip, after = xp.any(norms > self.most), {"total": state["total"] + norms}
        if self.scope is Scope.ELEMENT:
            return Decision(None, norms / 2.0, skip), after
        return Decision(xp.ones_like(norms) / 2.0, None, skip), after


@dataclass
class Tensors:
    """The numbers of each stage, and a list of what was applied."""

    numbers: list[list[float]]
    applied: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, stage: Stage) -> tuple[Array, Array]:
        numbers = np.array(self.numbers[len(self.applied)])
        return numbers, np.full(numbers.shape, True)

    def mend(self, stage: Stage, numbers: Array) -> Array:
        return np.where(np.isfinite(numbers), numbers, 0.0)

    def facts(self, stage: Stage) -> dict[str, Array]:
        return {}

    def representable(self, stage: Stage, decision: StageDecision) -> StageDecision:
        if decision.limit is None:
            return decision
        return decision._replace(limit=np.floor(decision.limit))

    def apply(
        self, stage: Stage, decision: StageDecision, outcome: Outcome, *, skip: Array, last: bool
    ) -> None:
        after = np.asarray(
            outcome.after[1] if isinstance(outcome.after, tuple) else outcome.after
        ).tolist()
        self.applied.append({"skip": bool(skip), "last": last, "after": after})


PLAN = stages(kk.clip.Chain(Total(10.0), Total(20.0, Scope.ELEMENT)), ["a", "b"])
FRESH = begin_stages(PLAN, [np.zeros(2), np.zeros(2)], xp=np)
COUNTS = {"attempted": 0, "accepted": 0, "bad_in_a_row": 0, "skipped_in_a_row": 0}


def step(numbers: list[list[float]], state: State = FRESH, **how: Any) -> tuple[Tensors, Any, Any]:
    """Return the tensors after a step, the completed step, and its state as plain data."""
    tensors = Tensors(numbers)
    how = {"nonfinite": "skip", **how}
    done: CompletedStep = run_step(PLAN, state, tensors, xp=np, **how)
    plain = to_plain(PLAN, done.state)
    totals = [value for key, value in plain.items() if key.endswith("total")]
    return tensors, done, {**{key: plain[key] for key in COUNTS}, "totals": totals}


@pytest.mark.parametrize("stop", [False, True])
def test_the_statistics_of_all_stages_are_committed(stop: bool) -> None:
    tensors, done, state = step([[4.0, 6.0], [1.0, 5.0]], stop_at_skip=stop)
    assert tensors.applied == [
        {"skip": False, "last": False, "after": [2.0, 3.0]},
        # Limits of 0.5 and 2.5, rounded to 0 and 2 by the tensors.
        {"skip": False, "last": True, "after": [0.0, 2.0]},
    ]
    assert state == {**COUNTS, "attempted": 1, "accepted": 1, "totals": [[4.0, 6.0], [1.0, 5.0]]}
    assert done.outcomes[1].earlier == done.outcomes[:1] and not done.skip and not done.any_bad


@pytest.mark.parametrize("stop", [False, True])
def test_a_skip_in_the_first_stage_commits_no_stage(stop: bool) -> None:
    _, _, before = step([[4.0, 6.0], [1.0, 5.0]])
    _, accepted, _ = step([[4.0, 6.0], [1.0, 5.0]])
    tensors, done, state = step([[4.0, 60.0], [1.0, 5.0]], accepted.state, stop_at_skip=stop)
    assert state == {**before, "attempted": 2, "skipped_in_a_row": 1}
    assert [applied["skip"] for applied in tensors.applied] == [True] * (1 if stop else 2)
    assert len(done.outcomes) == (1 if stop else 2) and done.outcomes[-1].action == "skipped"


@pytest.mark.parametrize("stop", [False, True])
def test_a_skip_in_the_last_stage_takes_back_the_first(stop: bool) -> None:
    tensors, _, state = step([[4.0, 6.0], [1.0, 50.0]], stop_at_skip=stop)
    assert [applied["skip"] for applied in tensors.applied] == [False, True]
    assert state == {
        **COUNTS,
        "attempted": 1,
        "skipped_in_a_row": 1,
        "totals": [[0.0, 0.0], [0.0, 0.0]],
    }


def test_a_non_finite_number_of_any_stage_is_counted() -> None:
    _, done, state = step([[4.0, 6.0], [1.0, np.nan]])
    assert done.any_bad and done.skip
    assert state["bad_in_a_row"] == 1 and state["skipped_in_a_row"] == 0
    assert state["totals"] == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("number", [6.0, 60.0, np.inf])
def test_an_overflow_counts_an_attempt_and_nothing_else(number: float, stop: bool) -> None:
    _, accepted, before = step([[4.0, 6.0], [1.0, 5.0]])
    tensors, done, state = step(
        [[4.0, number], [1.0, 5.0]], accepted.state, overflow=np.asarray(True), stop_at_skip=stop
    )
    assert state == {**before, "attempted": 2} and done.skip
    assert all(applied["skip"] for applied in tensors.applied)


def test_without_an_overflow_a_scaled_step_is_any_step() -> None:
    _, done, state = step([[4.0, 6.0], [1.0, 5.0]], overflow=np.asarray(False))
    assert state == step([[4.0, 6.0], [1.0, 5.0]])[2] and not done.skip


def test_an_outcome_holds_its_numbers_as_views() -> None:
    _, done, _ = step([[4.0, 6.0], [1.0, 5.0]], view=lambda array: ("view", array))
    assert done.outcomes[0].norms[0] == "view" and done.outcomes[0].skipped[0] == "view"


def test_a_non_finite_step_leaves_the_count_of_skips_as_it_is() -> None:
    spike, calm = [[4.0, 60.0], [1.0, 5.0]], [[4.0, 6.0], [1.0, 5.0]]
    _, first, _ = step(spike)
    _, second, state = step([[4.0, np.nan], [1.0, 5.0]], first.state)
    assert (state["skipped_in_a_row"], state["bad_in_a_row"]) == (1, 1)
    _, third, state = step(spike, second.state)
    assert (state["skipped_in_a_row"], state["bad_in_a_row"]) == (2, 0)
    assert step(calm, third.state)[2]["skipped_in_a_row"] == 0
