"""What holds for every rule in every framework: non-finite numbers, skipped steps, counters.

Pure arithmetic around `Rule.decide`, written once. Non-finite norms never reach a rule, a skipped
step commits nothing but its count, and statistics are kept only of accepted steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from niwaki.errors import InvalidArgument, Refused
from niwaki.rule import Array, Decision, Namespace, Quantity, Rule, Scope, State, combine

POLICIES = ("skip", "raise", "zero", "pass")
"""What to do with a step that has a non-finite gradient; the first is the default."""

_COUNTERS = ("attempted", "accepted", "bad_in_a_row")
_PREFIX = "rule."


class Verdict(NamedTuple):
    """What apply does: one `factor` or `limit` per measured number, `bad` numbers, and whether to skip."""

    factor: Array
    limit: Array | None
    bad: Array
    skip: Array


def begin(rule: Rule, norms: Array, *, xp: Namespace) -> State:
    """Return the fresh state for vectors of measured norms like `norms`, a flat dict."""
    zero = xp.asarray(0)
    # Of the numbers only length and dtype matter, and the first step may be a non-finite one.
    like = _at_scope(rule, xp.zeros_like(norms), xp=xp)
    inner = {f"{_PREFIX}{key}": value for key, value in rule.init(like, xp=xp).items()}
    return {**dict.fromkeys(_COUNTERS, zero), **inner}


def judge(
    rule: Rule,
    norms: Array,
    state: State,
    *,
    present: Array,
    xp: Namespace,
    nonfinite: str = "skip",
    facts: Mapping[str, Array] | None = None,
) -> tuple[Verdict, State]:
    """Return what apply has to do for these measured norms, and the state afterwards.

    `norms`: shape (n,), one per tensor (or unit, for rules of that scope), a non-finite entry
    meaning that its tensor has non-finite entries. `present`: shape (n,), false for tensors that
    took no part. `facts`: what else the rule needs, by name.
    """
    bad = present & ~xp.isfinite(norms)
    any_bad = xp.any(bad)
    good = present & ~bad
    seen = xp.where(good, norms, xp.zeros_like(norms))
    step = xp.astype(state["attempted"], norms.dtype)
    inner = {key[len(_PREFIX) :]: value for key, value in state.items() if key.startswith(_PREFIX)}
    decision, after = rule.decide(
        _at_scope(rule, seen, xp=xp),
        inner,
        present=_any_at_scope(rule, good, xp=xp),
        facts={**(facts or {}), "step": step},
        xp=xp,
    )
    skip = decision.skip
    if nonfinite in ("skip", "raise"):
        skip = skip | any_bad
    verdict = _spread(decision, good, bad, skip, like=norms, xp=xp, nonfinite=nonfinite)
    kept = {f"{_PREFIX}{key}": xp.where(skip, inner[key], value) for key, value in after.items()}
    one, zero = xp.ones_like(state["attempted"]), xp.zeros_like(state["attempted"])
    counters = {
        "attempted": state["attempted"] + one,
        "accepted": state["accepted"] + xp.where(skip, zero, one),
        "bad_in_a_row": xp.where(any_bad, state["bad_in_a_row"] + one, zero),
    }
    return verdict, {**counters, **kept}


def check_policy(nonfinite: str, *, where: str) -> None:
    """Refuse an unknown policy for non-finite gradients."""
    if nonfinite not in POLICIES:
        raise InvalidArgument(
            "unknown policy for non-finite gradients", where=where, got=nonfinite, allowed=POLICIES
        )


def check_rule(rule: object, of: Quantity, *, where: str, available: Sequence[str] = ()) -> None:
    """Refuse what is no rule, acts on something else, or needs what this caller cannot measure."""
    if isinstance(rule, type) or not isinstance(rule, Rule):
        raise InvalidArgument(
            "this is no rule", where=where, got=repr(rule), allowed="such as nw.clip.ByNorm(1.0)"
        )
    name = type(rule).__name__
    if rule.of is not of:
        raise Refused(f"{name} acts on a {rule.of.value}, not on a {of.value}", where=where)
    if of is Quantity.GRADIENT and rule.scope in (Scope.UNIT, Scope.GROUP):
        raise Refused(f"{name} is per {rule.scope.value}, which is not measured here", where=where)
    missing = sorted(rule.needs - set(available))
    if missing:
        raise Refused(
            f"{name} needs {', '.join(missing)}",
            where=where,
            allowed=", ".join(available) or "norms",
        )


def norms_after(norms: Array, verdict: Verdict, *, xp: Namespace) -> Array:
    """Return what the measured norms are once the verdict is applied; zeroed tensors have norm 0."""
    kept = xp.where(verdict.factor == 0, xp.zeros_like(norms), norms) * verdict.factor
    return kept if verdict.limit is None else xp.minimum(kept, verdict.limit)


def to_plain(state: State) -> dict[str, Any]:
    """Return a state as plain numbers and lists, for JSON and for ``torch.load(weights_only=True)``."""
    return {key: value.tolist() for key, value in state.items()}


def from_plain(plain: Mapping[str, Any], like: State, *, xp: Namespace) -> State:
    """Return the state that `to_plain` wrote, with the dtypes of `like`; bit for bit the same."""
    if set(plain) != set(like):
        raise InvalidArgument(
            "this state belongs to another rule",
            where="load_state_dict",
            got=sorted(plain),
            allowed=sorted(like),
        )
    return {key: xp.asarray(plain[key], dtype=value.dtype) for key, value in like.items()}


def _at_scope(rule: Rule, norms: Array, *, xp: Namespace) -> Array:
    return combine(norms, xp=xp) if rule.scope is Scope.GLOBAL else norms


def _any_at_scope(rule: Rule, good: Array, *, xp: Namespace) -> Array:
    return xp.reshape(xp.any(good), (1,)) if rule.scope is Scope.GLOBAL else good


def _spread(
    decision: Decision,
    good: Array,
    bad: Array,
    skip: Array,
    *,
    like: Array,
    xp: Namespace,
    nonfinite: str,
) -> Verdict:
    one = xp.ones_like(like)
    factor = one if decision.factor is None else decision.factor * one
    factor = xp.where(good, factor, one)
    if nonfinite == "zero":
        factor = xp.where(bad, xp.zeros_like(one), factor)
    limit = None if decision.limit is None else decision.limit * one
    return Verdict(factor, limit, bad, skip)
