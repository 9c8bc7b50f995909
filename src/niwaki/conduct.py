"""What holds for every rule in every framework: non-finite numbers, skipped steps, counters.

Pure arithmetic around `Rule.decide`, written once. Non-finite norms never reach a rule, a skipped
step commits nothing but its count, and statistics are kept only of accepted steps. Between steps
a state is plain data, and statistics of single tensors stand beside the names of these tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from niwaki.errors import InvalidArgument, Refused
from niwaki.rule import Array, Decision, Namespace, Quantity, Rule, Scope, State, combine

POLICIES = ("skip", "raise", "zero", "pass")
"""What to do with a step that has a non-finite gradient; the first is the default."""

_COUNTERS = ("attempted", "accepted", "bad_in_a_row")
_PREFIX = "rule."
_NAMES = "names"


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
    if of is Quantity.GRADIENT and rule.scope is Scope.UNIT:
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


def judge_named(
    rule: Rule,
    names: Sequence[str],
    norms: np.ndarray,
    state: Mapping[str, Any] | None,
    *,
    present: np.ndarray,
    nonfinite: str = "skip",
) -> tuple[Verdict, dict[str, Any]]:
    """Return the verdict and the state after it as plain data, for NumPy numbers that bear names.

    `names`: one per number; a tensor of several units has its name as many times. `state`: what
    this returned for the same rule, whatever the names were then, or ``None`` for a fresh one.
    """
    arrays = from_plain(rule, state, names)
    verdict, arrays = judge(rule, norms, arrays, present=present, xp=np, nonfinite=nonfinite)
    return verdict, to_plain(rule, arrays, names)


def to_plain(rule: Rule, state: State, names: Sequence[str]) -> dict[str, Any]:
    """Return a state as plain numbers and lists, for JSON and for ``torch.load(weights_only=True)``.

    A state with an entry per measured number also has the entry ``names``.
    """
    plain = {key: value.tolist() for key, value in state.items()}
    return {**plain, _NAMES: list(names)} if _named_axes(rule, len(names)) else plain


def from_plain(rule: Rule, plain: Mapping[str, Any] | None, names: Sequence[str]) -> State:
    """Return the NumPy state for these names that `to_plain` wrote for perhaps other names.

    Statistics go with their names: a known name keeps its own, a new one starts afresh, those of
    vanished names are dropped. Raises `InvalidArgument` for what is no state of this rule.
    """
    fresh = begin(rule, np.zeros(len(names)), xp=np)
    if plain is None:
        return fresh
    axes = _named_axes(rule, len(names))
    expected = {*fresh, _NAMES} if axes else set(fresh)
    if not isinstance(plain, Mapping) or set(plain) != expected:
        raise InvalidArgument(
            "this state belongs to another rule",
            where=type(rule).__name__,
            got=sorted(map(str, plain)) if isinstance(plain, Mapping) else type(plain).__name__,
            allowed=sorted(expected),
        )
    before = _checked_names(plain[_NAMES]) if axes else []
    state = {}
    for key, like in fresh.items():
        shape = list(like.shape)
        if key in axes:
            shape[axes[key]] = len(before)
        state[key] = _array(key, plain[key], like.dtype, tuple(shape))
    return _realigned(state, fresh, axes, before, list(names))


def _named_axes(rule: Rule, count: int) -> dict[str, int]:
    """Return entry of the state -> the axis along which it has one number per name."""
    one, more = (begin(rule, np.zeros(count + extra), xp=np) for extra in (0, 1))
    return {
        key: next(i for i, size in enumerate(more[key].shape) if size != value.shape[i])
        for key, value in one.items()
        if value.shape != more[key].shape
    }


def _checked_names(names: object) -> list[str]:
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise InvalidArgument("the names of a state are a list of str", got=repr(names)[:80])
    return list(names)


def _array(key: str, value: object, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.asarray(value)
        # Of an empty list no kind can be seen.
        fits = np.can_cast(array.dtype, dtype, "same_kind") or array.size == 0
    except (TypeError, ValueError, OverflowError):
        array, fits = np.empty(0), False
    if not fits or array.shape != shape:
        raise InvalidArgument(
            "this entry of the state does not fit",
            where=key,
            got=repr(value)[:80],
            allowed=f"{dtype} of shape {shape}",
        )
    return array.astype(dtype)


def _realigned(
    state: State, fresh: State, axes: Mapping[str, int], before: list[str], names: list[str]
) -> State:
    if before == names or not axes:
        return state
    places = {key: place for place, key in enumerate(_numbered(before))}
    known = [(now, places[key]) for now, key in enumerate(_numbered(names)) if key in places]
    to, source = [now for now, _ in known], [then for _, then in known]
    for key, axis in axes.items():
        moved = np.moveaxis(fresh[key].copy(), axis, 0)
        moved[to] = np.moveaxis(state[key], axis, 0)[source]
        state[key] = np.moveaxis(moved, 0, axis)
    return state


def _numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    # Of units, which share the name of their tensor, the third is the third.
    seen: Counter[str] = Counter()
    numbered = []
    for name in names:
        numbered.append((name, seen[name]))
        seen[name] += 1
    return numbered


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
    if limit is not None:
        # A limit of zero (of a schedule, or learned from nothing but zeros) leaves the tensor alone.
        limit = xp.where(limit > 0, limit, math.inf * one)
    return Verdict(factor, limit, bad, skip)
