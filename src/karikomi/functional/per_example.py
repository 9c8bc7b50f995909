"""Clip the gradients of the examples of a batch one by one, and reduce them, in a form that can be traced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.functional.library import Library
from karikomi.rule import Array, Composite, Quantity, Rule, Scope, State, Stateless, order_of
from karikomi.rules.decide import PREFIX, check_rule

ATTEMPTED = "attempted"
REDUCTIONS = ("mean", "sum", "none")


class ClippedExamples(NamedTuple):
    """Clipped gradients, reduced over the examples; the norms before; and the state after the step.

    `norms`: one per example, shape (examples,), or with a rule per tensor shape (tensors, examples).
    """

    arrays: dict[str, Array]
    norms: Array
    state: State


def check_examples_rule(rule: Rule | Composite, reduce: str, *, where: str) -> None:
    """Raise an error for a rule that does not decide about examples, and for an unknown reduction."""
    check_rule(rule, Quantity.GRADIENT, where=where)
    learns = not getattr(rule, "of_examples", False) and not isinstance(rule, Stateless)
    if isinstance(rule, Composite) or rule.scope not in (Scope.GLOBAL, Scope.TENSOR) or learns:
        raise Unsupported(
            f"{type(rule).__name__} does not decide about single examples",
            where=where,
            allowed="ByGlobalNorm (flat), ByNorm (per layer), AdaptiveQuantile, Normalize, Smooth",
        )
    if reduce not in REDUCTIONS:
        raise InvalidArgument("unknown reduction", where=where, got=reduce, allowed=REDUCTIONS)


def check_examples(shapes: Mapping[str, tuple[int, ...]], *, where: str) -> int:
    """Return the number of examples, or raise `InvalidArgument` where it is not the same everywhere."""
    counts = {name: shape[0] if shape else None for name, shape in shapes.items()}
    if not counts or None in counts.values() or len(set(counts.values())) > 1:
        raise InvalidArgument(
            "the first axis of each gradient is that of the examples",
            where=where,
            got=", ".join(f"{name}: {shapes[name]}" for name in list(shapes)[:3]) or "no array",
        )
    return next(iter(counts.values())) or 0


def clip_each_example(
    rule: Rule, found: Mapping[str, Array], state: State | None, *, reduce: str, library: Library
) -> ClippedExamples:
    """Return the gradients of examples, each scaled by its own factor and reduced; a bad example becomes zeros."""
    xp, order = library.xp, order_of(rule)
    rows = [library.unit_norms(array, (0,), order) for array in found.values()]
    stacked = xp.reshape(library.vector(rows), (len(rows), rows[0].shape[0]))
    if rule.scope is Scope.GLOBAL:
        norms = _joint(stacked, order, library)
    else:
        norms = xp.reshape(stacked, (-1,))
    inner, attempted = _begun(rule, norms, state, library)
    good = xp.isfinite(norms)
    facts = {"step": xp.astype(attempted, library.wide)}
    seen = xp.where(good, norms, xp.zeros_like(norms))
    decision, after = rule.decide(seen, inner, present=good, facts=facts, xp=xp)
    factors = xp.where(good, decision.factor, xp.zeros_like(norms))
    count = stacked.shape[1]
    arrays = {}
    for place, (name, array) in enumerate(found.items()):
        own = (
            factors if rule.scope is Scope.GLOBAL else factors[place * count : (place + 1) * count]
        )
        arrays[name] = _reduced(library.scaled_units(array, own, (0,)), reduce, library)
    settled = {PREFIX + key: value for key, value in after.items()}
    shown = norms if rule.scope is Scope.GLOBAL else stacked
    return ClippedExamples(arrays, shown, {ATTEMPTED: attempted + 1, **settled})


def _begun(rule: Rule, norms: Array, state: State | None, library: Library) -> tuple[State, Array]:
    if state is None:
        like = library.constants([0.0])
        return rule.init(like, xp=library.xp), library.xp.asarray(0)
    inner = {key.removeprefix(PREFIX): v for key, v in state.items() if key.startswith(PREFIX)}
    fresh = rule.init(library.constants([0.0]), xp=library.xp)
    if inner.keys() != fresh.keys() or ATTEMPTED not in state:
        raise InvalidArgument(
            "this state belongs to another rule", where=type(rule).__name__, got=sorted(state)
        )
    return inner, state[ATTEMPTED]


def _joint(stacked: Array, order: float, library: Library) -> Array:
    """Return the joint norm of each column of norms."""
    return library.unit_norms(stacked, (1,), order)


def _reduced(array: Array, reduce: str, library: Library) -> Array:
    if reduce == "none":
        return array
    total = library.xp.sum(library.widened(array), axis=0)
    total = total / max(array.shape[0], 1) if reduce == "mean" else total
    return library.xp.astype(total, array.dtype)
