"""Prune pytrees of parameters: masks are made on the host, between steps, and applied inside of ``jit``.

Which weights go is the decision of all frameworks (`karikomi.selection.exact_masks`); it depends on values and
sorts out ties one by one, so it is no part of a compiled step. A step needs `masked` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from karikomi import numpy as host
from karikomi.errors import InvalidArgument, UnknownName, Unsupported, suggest
from karikomi.jax.pytrees import named, replaced
from karikomi.prune import Coupled, Layout, Pattern, Score
from karikomi.prune.schedules.one_shot import PruningSchedule
from karikomi.prune.schedules.pruning_schedule import step_of

Masks = dict[str, jax.Array]
"""Name -> bool array of a leaf's shape, true where a weight is kept: a pytree itself."""

Facts = Mapping[str, Mapping[str, Any]]


def prune(
    params: Any,
    *,
    sparsity: float | None = None,
    width: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    bytes: float | None = None,
    score: str | Score = "magnitude",
    allocation: str | None = None,
    pattern: str | Pattern = "unstructured",
    facts: Facts | None = None,
    layouts: Mapping[str, Layout] | None = None,
    coupled: Sequence[Coupled] | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    masks: Mapping[str, Any] | None = None,
) -> tuple[Any, Masks]:
    """Return ``(params with the least important at zero, masks)``, outside of ``jit``.

    `params`: a pytree of floating arrays, ``None`` leaves left out; names are paths joined with dots
    (``"dense.kernel"``). All other arguments, and what is raised, are those of `karikomi.numpy.prune`, from
    which the same weights get the same masks: for Flax ``only="*kernel"``, and ``Layout(units=-1,
    inputs=-2)`` where a pattern speaks of units. Masks lie where their weights lie.

    Also raises `Unsupported` under ``jit``, and for arrays of which other processes hold a part.

    >>> params = {"dense": {"kernel": jnp.array([[3.0, -1.0], [2.0, -4.0]]), "bias": jnp.zeros(2)}}
    >>> params, masks = prune(params, sparsity=0.5, only="*kernel")
    >>> params["dense"]["kernel"].tolist(), masks["dense.kernel"].tolist()
    ([[3.0, 0.0], [0.0, -4.0]], [[True, False], [False, True]])

    Source: Han et al. 2015 (magnitude); Frankle and Carbin 2019 (global).
    """
    where = "jax.prune"
    _, kept = host.prune(
        _on_host(params, where=where),
        sparsity=sparsity,
        width=width,
        parameters=parameters,
        macs=macs,
        bytes=bytes,
        score=score,
        allocation=allocation,
        pattern=pattern,
        facts=facts,
        layouts=layouts,
        coupled=coupled,
        only=only,
        exclude=exclude,
        masks=_masks_on_host(masks, where=where),
    )
    placed = _beside(params, kept, where=where)
    return masked(params, placed), placed


def masked(tree: Any, masks: Mapping[str, Any]) -> Any:
    """Return params, or their gradients or updates, with ``+0.0`` wherever a mask is false; runs under ``jit``.

    ``where(mask, leaf, 0)``: an entry that is masked is zero even if it was NaN. Gradients are masked before
    they are clipped, so that what is gone counts in no norm; params after each step.

    `masks`: what `prune` returned; leaves without a mask, and ``None``, stay as they are. Raises
    `UnknownName` for a mask without its leaf, `InvalidArgument` for one that does not fit.

    >>> masked({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})["w"].tolist()
    [1.0, 0.0]
    """
    found = _leaves(tree, where="jax.masked")
    _check_masks(masks, found, where="jax.masked")
    for name, leaf in named({name: found[name] for name in masks}, where="jax.masked").items():
        if leaf is not None:
            mask = _fitting(name, masks[name], leaf.shape)
            found[name] = jnp.where(mask, leaf, jnp.zeros_like(leaf))
    return replaced(tree, found)


def masked_moments(state: Any, params: Any, masks: Mapping[str, Any]) -> Any:
    """Return an optimizer's state with its moments of masked weights at zero; runs under ``jit``.

    Every part of the state that is built like `params`, with floating leaves, is masked like them: the
    moments of optax's optimizers, the traces of momentum; what ``optax.masked`` and
    ``optax.multi_transform`` left out of them (``optax.MaskedNode``) may be missing. The rest, counters and
    parts built otherwise, stays as it is. `masked` weights stay at zero without it; it is for optimizers that go
    on with other masks.

    Raises what `masked` raises.

    >>> import optax
    >>> params = {"w": jnp.ones(2)}
    >>> state = optax.adam(0.1).init(params)[0]._replace(mu={"w": jnp.ones(2)})
    >>> masked_moments(state, params, {"w": jnp.array([True, False])}).mu["w"].tolist()
    [1.0, 0.0]
    """
    _check_masks(masks, _leaves(params, where="jax.masked_moments"), where="jax.masked_moments")

    def alike(part: Any) -> bool:
        leaves, structure = jax.tree.flatten(part, is_leaf=_left_out)
        try:
            beside = structure.flatten_up_to(params)
        except ValueError:
            return False
        return all(
            _left_out(leaf)
            or (_floating(leaf) and jnp.shape(leaf) == getattr(other, "shape", None))
            for leaf, other in zip(leaves, beside, strict=True)
        )

    def forgotten(part: Any) -> Any:
        there = _leaves(part, where="jax.masked_moments")
        return masked(part, {name: mask for name, mask in masks.items() if name in there})

    return jax.tree.map(lambda part: forgotten(part) if alike(part) else part, state, is_leaf=alike)


def update_masks(
    params: Any,
    schedule: PruningSchedule,
    step: int,
    masks: Mapping[str, Any] | None = None,
    *,
    facts: Facts | None = None,
    layouts: Mapping[str, Layout] | None = None,
    coupled: Sequence[Coupled] | None = None,
) -> tuple[Any, Masks]:
    """Return ``(params, masks)`` after a step: pruned further if the schedule is due, else masked as before.

    To be called outside of ``jit`` after each step; a loop whose compiled step masks params itself calls it
    where ``schedule.due(step)`` alone. Its whole state are the masks and the number of the step: saved and
    given again, training goes on as if it had not stopped.

    Before the first masks there is an empty dict, which makes ``jit`` compile once more. `schedule`, `step`,
    `facts`, `layouts`, `coupled`: see `karikomi.numpy.prune_at`. Raises what `prune` raises, and `Unsupported` for
    schedules that rewind or regrow weights.

    >>> import karikomi as kk
    >>> params, masks = {"w": jnp.arange(1.0, 11.0)}, None
    >>> rule = kk.prune.Gradual(0.8, steps=(0, 4), every=2)
    >>> for step in range(6):
    ...     params, masks = update_masks(params, rule, step, masks)
    ...     print(jnp.count_nonzero(params["w"]), end=" ")
    10 10 3 3 2 2

    Source: Zhu and Gupta 2017, "To prune, or not to prune".
    """
    where = "jax.update_masks"
    step = step_of(schedule, step, where=where)
    if not schedule.due(step):
        masks = {} if masks is None else masks
        found = _leaves(params, where=where)
        _check_masks(masks, found, where=where)
        # Compiled, and given nothing that has no mask: a leaf may be what jit does not take.
        there = _masked({name: found[name] for name in masks}, dict(masks))
        return replaced(params, found | there), dict(masks)
    _, kept = host.prune_at(
        _on_host(params, where=where),
        schedule,
        step,
        _masks_on_host(masks, where=where),
        facts=facts,
        layouts=layouts,
        coupled=coupled,
    )
    placed = _beside(params, kept, where=where)
    return masked(params, placed), placed


_masked = jax.jit(masked)


def _leaves(tree: Any, *, where: str) -> dict[str, Any]:
    """Return name -> leaf of any kind: counters and keys lie beside weights."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)
    names = named(structure.unflatten([None] * len(leaves)), where=where)
    return dict(zip(names, leaves, strict=True))


def _floating(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _left_out(node: Any) -> bool:
    """Return whether this stands for what an optimizer does not see: ``optax.MaskedNode`` is an empty tuple."""
    return isinstance(node, tuple) and not node


def _check_masks(masks: Any, found: Mapping[str, Any], *, where: str) -> None:
    if not isinstance(masks, Mapping):
        raise InvalidArgument(
            "masks go by the names of leaves", where=where, got=type(masks).__name__
        )
    for name in masks:
        if name not in found:
            raise UnknownName(
                "a mask without its leaf",
                where=where,
                got=repr(name),
                hint=suggest(str(name), found),
            )


def _on_host(params: Any, *, where: str) -> dict[str, Any]:
    """Return name -> array; what is not floating as it is, to be refused only where it is selected."""
    leaves = _leaves(params, where=where)
    found = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    floating = {name: leaf for name, leaf in found.items() if _floating(leaf)}
    for name, leaf in named(floating, where=where).items():
        if isinstance(leaf, Tracer):
            raise Unsupported(
                "which weights go depends on their values, which are not known under jit",
                where=f"{where}: {name}",
                hint="call it between steps; masked runs under jit",
            )
        if leaf is not None and not leaf.is_fully_addressable:
            raise Unsupported(
                "other processes hold a part of this array",
                where=f"{where}: {name}",
                hint="jax.experimental.multihost_utils.process_allgather gathers it",
            )
        if leaf is not None:
            found[name] = np.asarray(leaf)
    return found


def _masks_on_host(masks: Mapping[str, Any] | None, *, where: str) -> dict[str, np.ndarray]:
    masks = {} if masks is None else masks
    _check_masks(masks, masks, where=where)
    return {name: np.asarray(mask) for name, mask in masks.items()}


def _beside(params: Any, kept: Mapping[str, np.ndarray], *, where: str) -> Masks:
    """Return masks as arrays that lie as their weights do."""
    leaves = _leaves(params, where=where)
    found = named({name: leaves[name] for name in kept}, where=where)
    return {name: jax.device_put(mask, found[name].sharding) for name, mask in kept.items()}  # type: ignore[union-attr]


def _fitting(name: str, mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """Return a mask as an array, or refuse one that is not boolean or of another shape."""
    if getattr(mask, "dtype", None) != np.bool_ or np.shape(mask) != shape:
        raise InvalidArgument(
            "the mask does not fit its leaf",
            where=f"jax.masked: {name}",
            got=f"{getattr(mask, 'dtype', type(mask).__name__)} {np.shape(mask)}",
            allowed=f"bool {shape}",
        )
    return jnp.asarray(mask)
