"""The decision of a rule alone, for measured norms: what the laws of rules are stated on."""

from __future__ import annotations

from collections.abc import Mapping

from karikomi.rule import Array, Namespace, Rule, State
from karikomi.rules.decide import StageDecision, committed, decide_stage
from karikomi.rules.stages import alone


def judge(
    rule: Rule,
    norms: Array,
    state: State,
    *,
    present: Array,
    xp: Namespace,
    nonfinite: str = "skip",
    facts: Mapping[str, Array] | None = None,
) -> tuple[StageDecision, State]:
    """Return the decision of one rule for measured norms, and the state after it.

    `norms`: shape (n,), one per tensor (or unit, for rules of that scope); a non-finite entry means
    that its tensor has non-finite entries. `present`: shape (n,), false for tensors without a
    gradient. `facts`: further facts that the rule needs, by name.
    """
    stage = alone(rule, [""] * norms.shape[0])
    decision, after = decide_stage(
        stage, norms, state, present=present, xp=xp, nonfinite=nonfinite, facts=facts
    )
    any_bad = xp.any(decision.bad)
    return decision, committed(state, after, skip=decision.skip, any_bad=any_bad, xp=xp)
