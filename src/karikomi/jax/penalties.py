"""Penalties on pytrees of parameters: a scalar to add to the loss, inside of what is differentiated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from karikomi.functional.unit_axes import UnitAxes, resolved_axes
from karikomi.jax.pytrees import named, shapes
from karikomi.prune.mask_mapping import check_masks
from karikomi.prune.penalties.penalty import Penalty, check_penalty, concerned, term

WHERE = "jax.penalty"


def penalty(
    params: Any,
    rule: Penalty,
    *,
    unit_axes: UnitAxes | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    step: int | jax.Array | None = None,
    masks: Mapping[str, Any] | None = None,
) -> jax.Array:
    """Return a penalty as a scalar: call it where the loss is computed, under ``grad`` and ``jit``.

    ``strength(step) * sum of the rule's terms``, accumulated in float32 at least; its derivative at zero
    is zero, where that of ``jnp.abs`` is 1 and that of a norm is NaN. Weights that are not finite make it
    non-finite; a clip after it names them.

    `params`: a pytree of floating arrays. Arrays have no layer type, so all that are
    selected count, biases too: `only`, `exclude` are globs over their names (``"*kernel"`` for Flax).
    `unit_axes`: for `GroupLasso`, name or glob -> the axis, or axes, of one output unit; arrays without an
    entry do not count. `masks`: for `GrowingL2`, name -> true where a weight is kept. `step`: a number or an
    array, counted from 0; required for a strength that changes.

    Raises `InvalidArgument` for a rule, axes, masks or a step that do not fit, `UnknownName` for a name or
    glob.

    >>> import karikomi as kk
    >>> params = {"dense": {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]]), "bias": jnp.ones(2)}}
    >>> rule = kk.prune.GroupLasso(0.5)
    >>> slopes = jax.grad(lambda p: penalty(p, rule, unit_axes={"*kernel": -1}))(params)
    >>> [round(slope, 4) for slope in slopes["dense"]["kernel"].ravel().tolist()]
    [0.4243, 0.0, 0.5657, 0.0]
    """
    check_penalty(rule, masks, where=WHERE)
    found = {n: array for n, array in named(params, where=WHERE).items() if array is not None}
    known = shapes(found)
    check_masks(masks, known, where=WHERE)
    axes = resolved_axes(unit_axes, known, where=WHERE)
    names = concerned(rule, list(found), axes, masks, only=only, exclude=exclude, where=WHERE)
    terms = [
        term(
            rule,
            _wide(found[name]),
            axes.get(name, ()),
            None if masks is None else jnp.asarray(masks[name]),
            xp=jnp,
            constant=jax.lax.stop_gradient,
        )
        for name in names
        if found[name].size
    ]
    if isinstance(step, jax.Array):
        strength: Any = rule.strength_now(step.astype(jnp.float32), xp=jnp)
    else:
        strength = rule.strength_at(step)
    return strength * sum(terms, start=jnp.zeros((), jnp.float32))


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
