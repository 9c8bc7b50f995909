"""Non-finite numbers, skipped steps and counters, handled alike for every rule in every framework.

Pure arithmetic around `Rule.decide`. Non-finite norms are never passed to a rule, a skipped step
changes the counters only, and statistics are updated by accepted steps only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.rule import (
    Array,
    Composite,
    Decision,
    Namespace,
    Quantity,
    Rule,
    Scope,
    State,
    combine,
    is_composite,
    order_of,
)
from karikomi.rules.outcome import Outcome
from karikomi.rules.stages import Part, Stage, alone

POLICIES = ("skip", "raise", "zero", "zero_entries", "pass")
"""What to do with a step that has a non-finite gradient; the first is the default.

``zero`` takes a tensor with a bad entry out of the step as a whole, ``zero_entries`` the bad entries alone: the others
are measured and clipped as ever.
"""

COUNTERS = ("attempted", "accepted", "bad_in_a_row", "skipped_in_a_row")
"""Entries of every state; rules are given ``attempted`` as the fact ``step``, and the last under its own name."""

PREFIX = "rule."


class StageDecision(NamedTuple):
    """The decision of a stage: a `factor` or `limit` per number, `bad` (non-finite) numbers, whether to skip."""

    factor: Array
    limit: Array | None
    bad: Array
    skip: Array


def begin(rule: Rule, norms: Array, *, xp: Namespace) -> State:
    """Return the fresh state of one rule for vectors of measured norms like `norms`, a flat dict."""
    return begin_stages([alone(rule, [""] * norms.shape[0])], [norms], xp=xp)


def begin_stages(stages: Sequence[Stage], norms: Iterable[Array], *, xp: Namespace) -> State:
    """Return the fresh state of all stages, for vectors like these, one per stage."""
    state: State = dict.fromkeys(COUNTERS, xp.asarray(0))
    for stage, vector in zip(stages, norms, strict=True):
        # Of the numbers only length and dtype matter, and the first step may be a non-finite one.
        like = xp.zeros_like(vector)
        for part in stage.parts:
            own = like[:1] if part.rule.scope is Scope.GLOBAL else like
            inner = part.rule.init(own, xp=xp)
            state |= {f"{PREFIX}{part.key}{key}": value for key, value in inner.items()}
    return state


def decide_stage(
    stage: Stage,
    norms: Array,
    state: State,
    *,
    present: Array,
    xp: Namespace,
    nonfinite: str = "skip",
    facts: Mapping[str, Array] | None = None,
    members: Mapping[str, Array] | None = None,
) -> tuple[StageDecision, State]:
    """Return the decision of one stage, and the entries of the state as they are if the step is taken.

    `members`: the masks of the parts by their keys, where the framework keeps them on a device. The
    second result is passed to `committed`, merged with those of all other stages of the step.
    """
    bad = present & ~xp.isfinite(norms)
    good = present & ~bad
    zero, ones = xp.zeros_like(norms), xp.ones_like(norms)
    seen = xp.where(good, norms, zero)
    common = {
        **(facts or {}),
        "step": xp.astype(state["attempted"], norms.dtype),
        "skipped_in_a_row": xp.astype(state["skipped_in_a_row"], norms.dtype),
    }
    factor, limit, skip, learned = None, None, None, {}
    lost = bad
    for part in stage.parts:
        concerned, own_norms = good, seen
        if part.members is not None:
            mask = (members or {}).get(part.key)
            concerned = good & (xp.asarray(part.members) if mask is None else mask)
            own_norms = xp.where(concerned, seen, zero)
        decision, after = _decide(part, own_norms, state, concerned, common, xp=xp)
        learned |= after
        skip = decision.skip if skip is None else skip | decision.skip
        if decision.factor is not None:
            if part.rule.of is Quantity.GRADIENT:
                lost = lost | (concerned & (decision.factor == 0))
            factors = xp.where(concerned, decision.factor * ones, ones)
            factor = factors if factor is None else factor * factors
            seen = seen * factors
        if decision.limit is not None:
            # A limit of zero (from a schedule, or learned from zeros only) leaves the tensor unchanged.
            limits = decision.limit * ones
            limits = xp.where(concerned & (limits > 0), limits, math.inf * ones)
            limit = limits if limit is None else xp.minimum(limit, limits)
            seen = xp.minimum(seen, limit)
    factor = ones if factor is None else factor
    if nonfinite in ("skip", "raise"):
        # A factor of zero is an underflow: the joint norm, or its inverse, is out of the range of the dtype.
        skip = skip | xp.any(lost)
    if nonfinite == "zero":
        factor = xp.where(bad, zero, factor)
    return StageDecision(factor, limit, bad, skip), learned


def committed(state: State, learned: State, *, skip: Array, any_bad: Array, xp: Namespace) -> State:
    """Return the state after a step; a skipped step changes the counters only."""
    kept = {key: xp.where(skip, state[key], value) for key, value in learned.items()}
    zero, ones = xp.zeros_like(state["attempted"]), xp.ones_like(state["attempted"])
    in_a_row = xp.where(skip, state["skipped_in_a_row"] + ones, zero)
    return {
        **state,
        **kept,
        "attempted": state["attempted"] + ones,
        "accepted": state["accepted"] + xp.where(skip, zero, ones),
        "bad_in_a_row": xp.where(any_bad, state["bad_in_a_row"] + ones, zero),
        # A non-finite step is not a skip by the rule that uses this count.
        "skipped_in_a_row": xp.where(any_bad, state["skipped_in_a_row"], in_a_row),
    }


def check_policy(nonfinite: str, *, where: str) -> None:
    """Raise `InvalidArgument` for an unknown policy for non-finite gradients."""
    if nonfinite not in POLICIES:
        raise InvalidArgument(
            "unknown policy for non-finite gradients", where=where, got=nonfinite, allowed=POLICIES
        )


def check_rule(rule: object, *of: Quantity, where: str, available: Sequence[str] = ()) -> None:
    """Raise an error for an object that is not a rule, or a rule that acts on or needs something else."""
    if isinstance(rule, type) or not isinstance(rule, Rule | Composite):
        raise InvalidArgument(
            "not a rule", where=where, got=repr(rule), allowed="such as kk.clip.ByNorm(1.0)"
        )
    name = type(rule).__name__
    if rule.of not in of:
        wanted = " or ".join(f"a {item.value}" for item in of)
        raise Unsupported(f"{name} acts on a {rule.of.value}, not on {wanted}", where=where)
    for leaf in leaves(rule):
        missing = sorted(leaf.needs - set(available))
        if missing:
            raise Unsupported(
                f"{type(leaf).__name__} needs {', '.join(missing)}, which is not measured here",
                where=where,
                allowed=", ".join(available) or "norms",
            )


def leaves(rule: Rule | Composite) -> list[Rule]:
    """Return the single rules of a composite, or the rule itself."""
    if is_composite(rule):
        return [leaf for inner in rule.rules for leaf in leaves(inner)]
    return [cast(Rule, rule)]


def outcome_of(
    stage: Stage,
    norms: Array,
    decision: StageDecision,
    *,
    skip: Array,
    nonfinite: str,
    earlier: tuple[Outcome, ...] = (),
    raw: Array | None = None,
    view: Callable[[Array], Any] | None = None,
    xp: Namespace,
) -> Outcome:
    """Return the outcome of a stage; `view`: how it holds its arrays, as they are by default.

    `raw`: the numbers as of before bad entries became zeros, where they did.
    """
    arrays = (norms if raw is None else raw, norms_after(norms, decision, xp=xp), skip)
    norms, after, skipped = arrays if view is None else map(view, arrays)
    return Outcome(
        names=stage.owners,
        norms=norms,
        after=after,
        skipped=skipped,
        element_wise=stage.element_wise,
        nonfinite_policy=nonfinite,
        peaks=stage.peaks,
        earlier=earlier,
        groups=stage.groups,
        order=stage.order,
    )


def norms_after(norms: Array, decision: StageDecision, *, xp: Namespace) -> Array:
    """Return the norms after the decision is applied; zeroed tensors have norm 0."""
    kept = xp.where(decision.factor == 0, xp.zeros_like(norms), norms) * decision.factor
    return kept if decision.limit is None else xp.minimum(kept, decision.limit)


def _decide(
    part: Part,
    seen: Array,
    state: State,
    concerned: Array,
    facts: Mapping[str, Array],
    *,
    xp: Namespace,
) -> tuple[Decision, State]:
    rule, key = part.rule, PREFIX + part.key
    inner = {name[len(key) :]: value for name, value in state.items() if name.startswith(key)}
    if rule.scope is Scope.GLOBAL:
        facts = _joint_facts(rule, facts, concerned, xp=xp)
        seen = combine(seen, xp=xp, order=order_of(rule))
        concerned = xp.reshape(xp.any(concerned), (1,))
    decision, after = rule.decide(seen, inner, present=concerned, facts=facts, xp=xp)
    return decision, {key + name: value for name, value in after.items()}


def _joint_facts(
    rule: Rule, facts: Mapping[str, Array], concerned: Array, *, xp: Namespace
) -> Mapping[str, Array]:
    joint: dict[str, Any] = dict(facts)
    if "weights" in rule.needs:
        weights = xp.where(concerned, facts["weights"], 0.0 * facts["weights"])
        joint["weights"] = combine(weights, xp=xp)
    if "sizes" in rule.needs:
        sizes = xp.where(concerned, facts["sizes"], 0.0 * facts["sizes"])
        joint["sizes"] = xp.reshape(xp.sum(sizes), (1,))
    return joint
