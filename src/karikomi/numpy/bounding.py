"""Bound trees of weights held as NumPy arrays: a pure function that returns new arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from karikomi import tree
from karikomi.bound import spared
from karikomi.bound.entries import UNGIVEN
from karikomi.bound.standing import standing
from karikomi.errors import InvalidArgument, Unsupported, check
from karikomi.numpy.arrays import Arrays, check_entries, like, named
from karikomi.numpy.attention_heads import Names, bound_heads
from karikomi.numpy.norms import check_finite, norm, peak, unit_norms
from karikomi.numpy.projections import as_rows, from_rows, nearest_points
from karikomi.numpy.scaling import clamped, representable, scaled, scaled_units
from karikomi.numpy.spectral_norm import spectral_norm
from karikomi.numpy.unit_axes import Axes, resolved_axes, resolved_fan_ins
from karikomi.rule import Composite, Quantity, Rule, Scope, State, order_of
from karikomi.rules import checkpoint, decide
from karikomi.rules.outcome import Outcome

MEASURED = ("fan_in", "negative_part", "distance", "spectral_norm", "largest_logit")
"""What rules on weights may need here besides norms."""

VECTORS = "vectors"
WHERE = "numpy.bound"


def bound(
    weights: Arrays,
    rule: Rule,
    state: State | None = None,
    *,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    unit_axes: Mapping[str, int | Sequence[int]] | None = None,
    fan_in: Mapping[str, int] | None = None,
    logits: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    attention: Mapping[str, tuple[Names, Names]] | None = None,
) -> tuple[Arrays, Outcome, State]:
    """Return ``(bounded weights, outcome, state)``; the input is left alone.

    `weights`: any tree of dicts, lists, tuples and named tuples of floating arrays, which comes back
    as the same containers. The name of an array is the path to it, such as ``layers.0.weight``.
    `only`, `exclude`: names or globs. Without `only`, rules per entry and per tensor spare the gains and running
    statistics of normalisation layers, which are recognised by name (``bn1.weight``, ``BatchNorm_0.scale``,
    ``gamma``); ``only="*"`` takes all. A `state` of a version that spared none continues to bound all.
    `unit_axes`: for rules per unit and for `SpectralCap`, name or glob -> the axis whose index is one
    output unit (0 for a matrix of shape (out, in)), or the axes that together name one. `fan_in`: for `InitScaled`,
    name or glob -> how many inputs feed one output of the layer. A name takes precedence over a glob, an earlier glob
    over a later one. Tensors without an entry are unchanged and listed in the outcome. `logits`, `attention`: for
    `QKClip`, attention -> largest logit per query head, and attention -> ``(query, key)``, names of the tensors whose
    first axis holds the heads.

    Raises `NonFinite` naming the tensor when a weight is not finite.
    Raises `InvalidArgument` for objects that are not such trees of floating arrays and for unit axes that do
    not fit, `UnknownName` for a name or glob that matches nothing.

    >>> import numpy as np, karikomi as kk
    >>> weights, outcome, state = bound({"w": np.array([[3.0, 4.0], [0.0, 1.0]])},
    ...                                 kk.bound.Clamp(2.0))
    >>> weights["w"].tolist()
    [[2.0, 2.0], [0.0, 1.0]]
    >>> layers = [{"weight": np.array([[3.0, 4.0]]), "bias": np.ones(1)}]
    >>> bounded, outcome, _ = bound(layers, kk.bound.MaxNorm(1.0), unit_axes={"*weight": 0})
    >>> bounded[0]["weight"].round(2).tolist(), outcome.left_alone
    ([[0.6, 0.8]], {'0.bias': 'no unit axis was named'})
    """
    decide.check_rule(rule, Quantity.WEIGHT, where=WHERE, available=MEASURED)
    if isinstance(rule, Composite):
        raise Unsupported("bounds are applied one at a time", where=WHERE, got=type(rule).__name__)
    weights = tree.collected(weights)
    found = named(weights, where=WHERE)
    check_entries(rule, found, where=WHERE)
    spare = spared.spares(rule, only, state)
    gains = spared.by_name(found) if spare else {}
    others = spared.left_alone(found, gains, only=only, exclude=exclude, where=WHERE)
    chosen = {name: array for name, array in found.items() if name not in others}
    if "largest_logit" in rule.needs:
        arrays, outcome, after = bound_heads(
            chosen,
            rule,  # type: ignore[arg-type]
            state,
            logits=logits,
            attention=attention,
        )
    else:
        axes = resolved_axes(unit_axes, found, where=WHERE)
        inputs = resolved_fan_ins(fan_in, found, where=WHERE)
        arrays, outcome, after = _bound_arrays(chosen, rule, state, axes, inputs)
    outcome = replace(outcome, left_alone={**outcome.left_alone, **others})
    return like(weights, {**found, **arrays}, where=WHERE), outcome, spared.marked(after, spare)


def _bound_arrays(
    found: dict[str, np.ndarray],
    rule: Rule,
    state: Mapping[str, Any] | None,
    unit_axes: Mapping[str, Axes],
    fan_in: Mapping[str, int],
) -> tuple[dict[str, np.ndarray], Outcome, State]:
    axes, left_alone = _targets(rule, found, unit_axes, fan_in)
    small, vectors = _divided(rule, state)
    points: dict[str, np.ndarray] = {}
    if "distance" in rule.needs:
        concerned = {name: found[name] for name in axes}
        attempted = int(small.get("attempted", 0)) if isinstance(small, Mapping) else 0
        points = nearest_points(rule, concerned, axes, attempted=attempted)
    measured = {
        name: _measured(rule, name, _apart(found[name], points.get(name)), axis, vectors)
        for name, axis in axes.items()
    }
    norms = np.concatenate(list(measured.values()))
    owners = [name for name, numbers in measured.items() for _ in numbers]
    check_finite(owners, np.isfinite(norms), where=WHERE)
    facts = {"fan_in": np.array([float(fan_in.get(name, 1)) for name in owners])}
    verdict, after = checkpoint.decide_named(
        rule, owners, norms, small, present=np.isfinite(norms), facts=facts
    )
    verdict = representable(verdict, [found[name] for name in owners])
    left = decide.norms_after(norms, verdict, xp=np)
    attempted = int(after["attempted"]) - 1
    held = standing(rule, left, verdict.factor, attempted=attempted)
    bounded, at_bound, start = dict(found), np.zeros(2), 0
    for name, numbers in measured.items():
        part = slice(start, start + len(numbers))
        start = part.stop
        if name in points:
            moved = _as_shape(verdict.factor[part] == 0.0, found[name], axes[name])
            nearest = points[name].astype(found[name].dtype)
            bounded[name] = np.where(moved, nearest, found[name])
        else:
            bounded[name] = _bounded(found[name], rule, axes[name], numbers, verdict, part)
        at_bound += _count_at_bound(bounded[name], rule, verdict, held, part)
    if "spectral_norm" in rule.needs:
        after[VECTORS] = {name: vector.tolist() for name, vector in vectors.items()}
    outcome = Outcome(
        names=tuple(owners),
        norms=norms,
        after=left,
        skipped=False,
        element_wise=rule.scope is Scope.ELEMENT,
        left_alone=left_alone,
        share_at_bound=float(at_bound[0] / max(at_bound[1], 1.0)),
        order=order_of(rule),
    )
    return bounded, outcome, after


def _divided(
    rule: Rule, state: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any] | None, dict[str, np.ndarray]]:
    """Return the counters and the state of the rule, and the vectors kept with them."""
    state = spared.without_mark(state)
    if state is None or "spectral_norm" not in rule.needs or not isinstance(state, Mapping):
        return state, {}
    vectors: Any = state.get(VECTORS)
    keys = sorted(map(str, state))
    given = isinstance(vectors, Mapping)
    check(type(rule).__name__, (given, "this state has no vectors", keys, None))
    small = {key: value for key, value in state.items() if key != VECTORS}
    return small, {name: np.asarray(vector, dtype=np.float64) for name, vector in vectors.items()}


def _targets(
    rule: Rule,
    found: Mapping[str, np.ndarray],
    unit_axes: Mapping[str, Axes],
    fan_in: Mapping[str, int],
) -> tuple[dict[str, Axes | None], dict[str, str]]:
    if rule.scope is Scope.UNIT or "spectral_norm" in rule.needs:
        axes: dict[str, Axes | None] = {n: unit_axes[n] for n in found if n in unit_axes}
        reason, hint = "no unit axis was named", "name unit axes: unit_axes={'w': 0}"
    elif "fan_in" in rule.needs:
        axes = {name: None for name in found if name in fan_in}
        reason, hint = "no fan-in was named", "name fan-ins: fan_in={'w': 784}"
    elif hasattr(rule, "given_for"):
        rule.check_names(found)  # type: ignore[attr-defined]
        axes = dict.fromkeys(rule.given_for(found), None)  # type: ignore[attr-defined]
        reason, hint = UNGIVEN, f"name them in {type(rule).__name__}"
    else:
        return dict.fromkeys(found, None), {}
    if not axes:
        raise InvalidArgument("no tensor to bound", where=WHERE, hint=hint)
    return axes, {name: reason for name in found if name not in axes}


def _measured(
    rule: Rule, name: str, array: np.ndarray, axis: Axes | None, vectors: dict[str, np.ndarray]
) -> np.ndarray:
    if "spectral_norm" in rule.needs:
        if np.iscomplexobj(array):
            raise Unsupported("the spectral norm of complex entries", where=f"{WHERE}: {name}")
        if isinstance(axis, tuple):
            raise Unsupported("a matrix has one axis of units", where=f"{WHERE}: {name}", got=axis)
        size, vectors[name] = spectral_norm(array, axis or 0, vectors.get(name), name=name)
        return np.array([size])
    if axis is not None:
        return unit_norms(as_rows(array, axis), 0, order_of(rule))
    if "negative_part" in rule.needs:
        # An infinite or NaN entry is detected on either side of zero.
        return np.array([peak(np.minimum(array, 0.0)) if np.isfinite(array).all() else math.nan])
    by_entry = rule.scope is Scope.ELEMENT
    return np.array([peak(array) if by_entry else norm(array, order_of(rule))])


def _apart(array: np.ndarray, point: np.ndarray | None) -> np.ndarray:
    """Return what separates an array from its nearest point, or the array itself for other rules."""
    if point is None:
        return array
    if np.iscomplexobj(array):
        raise Unsupported("complex entries have no order to project by", where=WHERE)
    with np.errstate(invalid="ignore"):
        return array.astype(np.float64) - point


def _as_shape(flags: np.ndarray, array: np.ndarray, axis: Axes | None) -> np.ndarray:
    if axis is None:
        return flags[0]
    several = (axis,) if isinstance(axis, int) else axis
    own = {place % array.ndim for place in several}
    return flags.reshape([n if place in own else 1 for place, n in enumerate(array.shape)])


def _bounded(
    array: np.ndarray,
    rule: Rule,
    axis: Axes | None,
    numbers: np.ndarray,
    verdict: decide.StageDecision,
    part: slice,
) -> np.ndarray:
    if verdict.limit is not None:
        return clamped(array, float(numbers[0]), float(verdict.limit[part][0]))
    factors = verdict.factor[part]
    if "negative_part" in rule.needs:
        kept = scaled(array, float(factors[0])) if factors[0] else np.zeros_like(array)
        return np.where(array < 0.0, kept, array)
    if axis is None or len(factors) == 1:
        return scaled(array, float(factors[0]))
    return from_rows(scaled_units(as_rows(array, axis), factors, 0), axis, array.shape)


def _count_at_bound(
    array: np.ndarray, rule: Rule, verdict: decide.StageDecision, held: np.ndarray, part: slice
) -> np.ndarray:
    if verdict.limit is not None:
        limit = float(verdict.limit[part][0])
        return np.array([np.count_nonzero(np.abs(array) >= limit), array.size])
    if "negative_part" in rule.needs:
        return np.array([np.count_nonzero(array <= 0.0), array.size])
    return np.array([np.count_nonzero(held[part]), len(held[part])])
