"""Bound the weights of a built model: now, after every step of fit, and in the file it is saved to."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from karikomi.bound import spared
from karikomi.errors import NonFinite, Unsupported
from karikomi.functional.bounding import (
    bound_named,
    fresh_bound_state,
    plan_bound,
    share_at_bound,
)
from karikomi.keras.arrays.library import library
from karikomi.keras.arrays.variables import on_host
from karikomi.keras.bounding.constraint import Bound, check_constraint, tensor_of
from karikomi.keras.bounding.constraint_slots import attach_, check_free, unsaved
from karikomi.keras.internals import all_layers
from karikomi.keras.layers.unit_axes import Weight, weights_of
from karikomi.rule import Rule, Scope, order_of
from karikomi.rules.outcome import Outcome
from karikomi.select import NOT_SELECTED, select

WHERE = "keras.bound_"


def bound_(
    model: Any,
    rule: Rule,
    *,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Outcome:
    """Bring the weights of a built model within a bound, and keep them there: fit bounds them after every step.

    ``weight = bounded(weight)`` at once, and a `Bound` as the constraint of each variable and of its layer, so
    that a saved model has it too. Unit axes and fan-ins come from the types of the layers. What is left alone,
    with the reason, is in ``outcome.left_alone``: by rules per unit what has no unit axis, by `InitScaled` what
    has no fan-in, by all what is not floating or not trained.

    Without `only`, rules per entry and per tensor spare the gains of normalisation layers, also of layers whose
    class is named like one; ``only="*"`` takes all.

    `only`, `exclude`: names of layers, which stand for all that is inside of them, paths of variables
    (``dense/kernel``), or globs over both. Call it before or after ``compile``, before or between calls of ``fit``
    of this model.

    Warns of weights whose bound a saved file will not have, since the layer has no such setting or is made
    by code: subclassed models, the projections of MultiHeadAttention. Call it again after loading those,
    or use ``kk.keras.clipped(optimizer, rule, bound=...)``, whose bound is saved with the optimizer.

    Raises `UnknownName` for a pattern that matches nothing; `Unsupported` for a variable that has another
    constraint, for rules that a constraint cannot follow (see `Bound`), and if nothing is left to bound;
    `NonFinite`, naming it, for a weight that is not finite; `InvalidArgument` for a model that is not built.
    Whatever it raises, nothing is changed.

    >>> import keras, karikomi as kk
    >>> head = keras.layers.Dense(1, kernel_initializer="ones", name="head")
    >>> model = keras.Sequential([keras.Input((4,)), head], name="net")
    >>> outcome = bound_(model, kk.bound.MaxNorm(1.0), only="head")
    >>> keras.ops.convert_to_numpy(head.kernel).ravel().tolist(), outcome.left_alone
    ([0.5, 0.5, 0.5, 0.5], {'net/head/bias': 'a bias'})
    """
    check_constraint(rule, where=WHERE)
    found = weights_of(model, where=WHERE)
    chosen = _chosen(model, found, only, exclude)
    spare = spared.spares(rule, only)
    reasons = {item.variable.path: _why_not(rule, item, spare=spare) for item in chosen}
    targets = [item for item in chosen if not reasons[item.variable.path]]
    if not targets:
        raise Unsupported(
            "no selected weight can be bounded",
            where=WHERE,
            got=", ".join(f"{name} ({why})" for name, why in list(reasons.items())[:5]),
        )
    selected = {id(item.variable) for item in chosen}
    for item in found:
        if id(item.variable) not in selected:
            reasons.setdefault(item.variable.path, NOT_SELECTED)
    bounds = [_bound(rule, item) for item in targets]
    for target, bound in zip(targets, bounds, strict=True):
        check_free(target, bound, where=WHERE)
    outcome = _apply_(rule, targets, {name: why for name, why in reasons.items() if why})
    for target, bound in zip(targets, bounds, strict=True):
        attach_(target, bound)
    if getattr(model, "train_function", None) is not None:
        model.train_function = None  # It was compiled without the constraints.
    lost = unsaved(model, targets)
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        warnings.warn(
            f"karikomi: fit keeps the bound on {', '.join(lost[:3])}{more}, but a saved model will not have it, "
            "since these layers are made by code or have no such setting; call kk.keras.bound_ again after "
            "loading, or use kk.keras.clipped(optimizer, rule, bound=...)",
            stacklevel=2,
        )
    return outcome


def _chosen(
    model: Any,
    found: Sequence[Weight],
    only: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> list[Weight]:
    meant: dict[str, set[int]] = {}
    for layer in all_layers(model)[1:]:
        if layer.weights:
            meant.setdefault(layer.name, set()).update(id(weight) for weight in layer.weights)
    for item in found:
        meant.setdefault(item.variable.path, set()).add(id(item.variable))

    def matched(patterns: str | Sequence[str]) -> set[int]:
        return set().union(*(meant[name] for name in select(meant, only=patterns, where=WHERE)))

    kept = set().union(*meant.values()) if only is None else matched(only)
    kept -= set() if exclude is None else matched(exclude)
    if not kept:
        raise Unsupported(
            "the selection leaves no weight", where=WHERE, got=f"only={only!r}, exclude={exclude!r}"
        )
    return [entry for entry in found if id(entry.variable) in kept]


def _why_not(rule: Rule, weight: Weight, *, spare: bool) -> str:
    if not weight.floating:
        return "not floating"
    if not weight.variable.trainable:
        return "not trained"
    if rule.scope is Scope.UNIT and weight.axes is None:
        return weight.no_axes
    if "fan_in" in rule.needs and weight.fan_in is None:
        return weight.no_fan_in
    return spared.GAIN if spare and weight.is_gain else ""


def _bound(rule: Rule, weight: Weight) -> Bound:
    return Bound(
        rule,
        unit_axis=weight.axes if rule.scope is Scope.UNIT else None,
        fan_in=weight.fan_in if "fan_in" in rule.needs else None,
    )


def _apply_(rule: Rule, targets: Sequence[Weight], left_alone: dict[str, str]) -> Outcome:
    own = library()
    # Paths need not be unique, but numbers are those of variables.
    keys = {str(place): target for place, target in enumerate(targets)}
    plan = plan_bound(
        rule,
        {key: tuple(entry.variable.shape) for key, entry in keys.items()},
        {key: entry.axes for key, entry in keys.items() if entry.axes is not None},
        {key: float(entry.fan_in) for key, entry in keys.items() if entry.fan_in is not None},
        where=WHERE,
    )
    arrays = {key: tensor_of(entry.variable) for key, entry in keys.items()}
    done = bound_named(plan, arrays, fresh_bound_state(plan, library=own), library=own)
    names = tuple(keys[key].variable.path for key in plan.stage.owners)
    norms, after = (on_host(numbers).astype(np.float64) for numbers in (done.norms, done.after))
    bad = [name for name, norm in zip(names, norms, strict=True) if not np.isfinite(norm)]
    if bad:
        raise NonFinite(
            f"non-finite weights in {bad[0]}",
            where=WHERE,
            hint="load the last good weights: no bound can mend them",
        )
    for key, item in keys.items():
        item.variable.assign(done.arrays[key])
    return Outcome(
        names=names,
        norms=norms,
        after=after,
        skipped=False,
        element_wise=rule.scope is Scope.ELEMENT,
        left_alone=left_alone,
        share_at_bound=share_at_bound(plan, done, host=on_host),
        order=order_of(rule),
    )
