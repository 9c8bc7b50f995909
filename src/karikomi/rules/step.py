"""One step of a rule: measure, decide and apply stage by stage, then commit the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from karikomi.rule import Array, Namespace, State
from karikomi.rules.decide import StageDecision, committed, decide_stage, outcome_of
from karikomi.rules.outcome import Outcome
from karikomi.rules.stages import Stage


class StepTensors(Protocol):
    """The tensors of one step in a framework, measured and changed stage by stage."""

    def measure(self, stage: Stage) -> tuple[Array, Array]:
        """Return the numbers of a stage and which of them are present, each of shape (numbers,)."""
        ...

    def mend(self, stage: Stage, numbers: Array) -> Array:
        """Set entries that are not finite to zero, and return the numbers of the stage measured again."""
        ...

    def facts(self, stage: Stage) -> Mapping[str, Array]:
        """Return the further facts that the rules of a stage need, by name."""
        ...

    def representable(self, stage: Stage, decision: StageDecision) -> StageDecision:
        """Return the decision with its limits rounded to the dtypes of the tensors."""
        ...

    def apply(
        self, stage: Stage, decision: StageDecision, outcome: Outcome, *, skip: Array, last: bool
    ) -> None:
        """Change the tensors as decided; `last`: whether no further stage is going to change them."""
        ...


class CompletedStep(NamedTuple):
    """The outcome of each stage that was decided, and the committed state of all stages."""

    outcomes: tuple[Outcome, ...]
    state: State
    skip: Array
    any_bad: Array


def run_step(
    stages: Sequence[Stage],
    state: State,
    tensors: StepTensors,
    *,
    xp: Namespace,
    nonfinite: str,
    stop_at_skip: bool = False,
    overflow: Array | None = None,
    members: Mapping[str, Array] | None = None,
    view: Callable[[Array], Any] | None = None,
) -> CompletedStep:
    """Measure, decide and apply all stages of one step.

    `stop_at_skip`: whether the stages after one that skips the step are left out, which reads the
    decision on the host; otherwise they are run without effect on the state. `overflow`: whether an AMP
    scaler skips the step, which then counts as an attempt and changes nothing else; ``None`` without
    a scaler. `members`: see `decide_stage`. `view`: how an `Outcome` holds the numbers, for those that are
    read on the host later.
    """
    learned: State = {}
    outcomes: tuple[Outcome, ...] = ()
    any_bad = xp.asarray(False)
    skip = any_bad if overflow is None else overflow
    for stage in stages:
        numbers, present = tensors.measure(stage)
        raw, mends = numbers, nonfinite == "zero_entries"
        if mends:
            any_bad = any_bad | xp.any(present & ~xp.isfinite(raw))
            numbers = tensors.mend(stage, numbers)
        decision, after = decide_stage(
            stage,
            numbers,
            state,
            present=present,
            xp=xp,
            nonfinite=nonfinite,
            facts=tensors.facts(stage),
            members=members,
        )
        decision = tensors.representable(stage, decision)
        learned |= after
        any_bad, skip = any_bad | xp.any(decision.bad), skip | decision.skip
        outcome = outcome_of(
            stage,
            numbers,
            decision,
            skip=bool(skip) if stop_at_skip else skip,
            nonfinite=nonfinite,
            earlier=outcomes,
            raw=raw if mends else None,
            view=view,
            xp=xp,
        )
        outcomes = (*outcomes, outcome)
        tensors.apply(stage, decision, outcome, skip=skip, last=stage is stages[-1])
        if stop_at_skip and bool(skip):
            break
    after = committed(state, learned, skip=skip, any_bad=any_bad, xp=xp)
    if overflow is not None:
        # The scaler tries another scale: the step shows nothing about the gradients.
        tried = {**state, "attempted": state["attempted"] + 1}
        after = {key: xp.where(overflow, tried[key], value) for key, value in after.items()}
    return CompletedStep(outcomes, after, skip, any_bad)
