"""Penalties on trees of NumPy arrays: the value and the gradients to add, the readable reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from karikomi import tree
from karikomi.errors import InvalidArgument, NonFinite
from karikomi.functional.unit_axes import UnitAxes, resolved_axes
from karikomi.numpy.arrays import Arrays, like, named
from karikomi.numpy.norms import check_arrays
from karikomi.prune.mask_mapping import check_masks
from karikomi.prune.penalties.penalty import Penalty, check_penalty, concerned, term

WHERE = "numpy.penalty"


def penalty(
    weights: Arrays,
    rule: Penalty,
    *,
    unit_axes: UnitAxes | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    step: int | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
) -> tuple[float, Arrays]:
    """Return ``(value, gradients)`` of a penalty: add the one to the loss, the others to its gradients.

    ``value = strength(step) * sum of the rule's terms``, in float64; gradients are a tree like the
    weights, of their dtypes, zero for what is not penalised.

    `weights`: any tree of dicts, lists, tuples and named tuples of floating arrays. Arrays have no
    layer type, so all that are selected count, biases too: `only`, `exclude` are globs
    over their names. `unit_axes`: for `GroupLasso`, name or glob -> the axis, or axes, of one output unit;
    arrays without an entry do not count. `masks`: for `GrowingL2`, name -> true where a weight is kept.
    `step`: counted from 0; required for a strength that changes.

    Raises `InvalidArgument` for a rule, axes, masks or a step that do not fit, `UnknownName` for a name or
    glob, `NonFinite` naming an array.

    >>> import karikomi as kk
    >>> layers = [{"weight": np.array([[3.0, -1.0]]), "bias": np.ones(1)}]
    >>> value, gradients = penalty(layers, kk.prune.L1(0.5), only="*weight")
    >>> value, gradients[0]["weight"].tolist(), gradients[0]["bias"].tolist()
    (2.0, [[0.5, -0.5]], [0.0])
    """
    check_penalty(rule, masks, where=WHERE)
    weights = tree.collected(weights)
    found = named(weights, where=WHERE)
    check_arrays(found, where=WHERE)
    shapes = {name: array.shape for name, array in found.items()}
    check_masks(masks, shapes, where=WHERE)
    axes = resolved_axes(unit_axes, shapes, where=WHERE)
    names = concerned(rule, list(found), axes, masks, only=only, exclude=exclude, where=WHERE)
    strength, value = rule.strength_at(step), 0.0
    gradients = {name: np.zeros_like(array) for name, array in found.items()}
    for name in names:
        kept = None if masks is None else masks[name]
        item, slope = _term(rule, name, found[name], axes.get(name, ()), kept)
        value += strength * item
        gradients[name] = (strength * slope).astype(found[name].dtype)
    return value, like(weights, gradients, where=WHERE)


def _term(
    rule: Penalty, name: str, array: np.ndarray, axes: tuple[int, ...], kept: np.ndarray | None
) -> tuple[float, np.ndarray]:
    if np.iscomplexobj(array):
        raise InvalidArgument("complex weights have no penalty", where=f"{WHERE}: {name}")
    wide = array.astype(np.float64)
    if not np.isfinite(wide).all():
        raise NonFinite("a weight is NaN or infinite", where=f"{WHERE}: {name}")
    if not array.size:
        return 0.0, wide
    value = float(term(rule, wide, axes, kept, xp=np, constant=lambda item: item))
    slope = rule.gradient(wide, axes, xp=np)
    return value, slope if kept is None else np.where(kept, 0.0, slope)
