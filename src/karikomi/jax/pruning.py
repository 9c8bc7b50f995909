"""Prune pytrees of parameters: masks are made on the host, between steps, and applied inside of ``jit``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from karikomi.jax.pytrees import is_floating, leaves_of, named, on_host, replaced
from karikomi.prune import (
    Allocation,
    Coupled,
    Importances,
    Layout,
    Pattern,
    Score,
    as_score,
)
from karikomi.prune.facts import Facts
from karikomi.prune.schedules.one_shot import PruningSchedule
from karikomi.prune.schedules.pruning_schedule import step_of
from karikomi.selection.array_arguments import check_masks
from karikomi.selection.array_masks import Beside, masks_of_arrays, scores_of_arrays
from karikomi.selection.request import PruneRequest, request_of, scheduled, scoring

Masks = dict[str, jax.Array]
"""Name -> bool array of a leaf's shape, true where a weight is kept: a pytree itself."""
How = Callable[[Any, jax.Array], jax.Array]
"""A leaf from its mask and the leaf."""


def prune(
    params: Any,
    *,
    sparsity: float | None = None,
    count: int | Mapping[str, int] | None = None,
    width: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    bytes: float | None = None,
    score: str | Score = "magnitude",
    allocation: Allocation | None = None,
    pattern: str | Pattern = "unstructured",
    rounding: str = "up",
    importance: Mapping[str, Any] | None = None,
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
    inputs=-2)`` where a pattern removes units. Masks have the sharding of their weights.

    Also raises `Unsupported` under ``jit``, and for arrays of which other processes hold a part.

    >>> params = {"dense": {"kernel": jnp.array([[3.0, -1.0], [2.0, -4.0]]), "bias": jnp.zeros(2)}}
    >>> params, masks = prune(params, sparsity=0.5, only="*kernel")
    >>> params["dense"]["kernel"].tolist(), masks["dense.kernel"].tolist()
    ([[3.0, 0.0], [0.0, -4.0]], [[True, False], [False, True]])

    Source: Han et al. 2015 (magnitude); Frankle and Carbin 2019 (global).
    """
    where = "jax.prune"
    request = request_of(
        where,
        sparsity=sparsity,
        count=count,
        width=width,
        parameters=parameters,
        macs=macs,
        bytes=bytes,
        score=score,
        allocation=allocation,
        pattern=pattern,
        rounding=rounding,
        importance=importance,
        facts=facts,
        only=only,
        exclude=exclude,
    )
    return _pruned(params, request, Beside(layouts, coupled, masks))


def scores(
    params: Any,
    *,
    score: str | Score = "magnitude",
    pattern: str | Pattern | None = None,
    facts: Facts | None = None,
    layouts: Mapping[str, Layout] | None = None,
    coupled: Sequence[Coupled] | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    masks: Mapping[str, Any] | None = None,
) -> Importances:
    """Return what the leaves are worth by a score, by name: the numbers by which `prune` ranks, outside of ``jit``.

    Arguments, and what is raised, as of `karikomi.numpy.scores`; the values are JAX arrays.

    >>> scores({"w": jnp.array([3.0, -1.0])})["w"].tolist()
    [3.0, 1.0]

    Source: of the formulas, the scores.
    """
    where, chosen = "jax.scores", as_score(score)
    request = scoring(where, chosen, pattern, facts=facts, only=only, exclude=exclude)
    arrays = on_host(params, where=where)
    found = scores_of_arrays(arrays, request, Beside(layouts, coupled, masks), leaf="leaf")
    return Importances(found, score=type(chosen).__name__.lower(), as_array=_as_array)


def _as_array(values: Any, _: str) -> jax.Array:
    return jnp.asarray(values)


def _pruned(params: Any, request: PruneRequest, beside: Beside) -> tuple[Any, Masks]:
    where = request.where
    kept = masks_of_arrays(on_host(params, where=where), request, beside, leaf="leaf")
    # With the sharding of their weights.
    leaves = leaves_of(params, where=where)
    found: Any = named({name: leaves[name] for name in kept}, where=where)
    placed = {name: jax.device_put(mask, found[name].sharding) for name, mask in kept.items()}
    return masked(params, placed), placed


def masked(tree: Any, masks: Mapping[str, Any]) -> Any:
    """Return params, or their gradients or updates, with ``+0.0`` wherever a mask is false; runs under ``jit``.

    ``where(mask, leaf, 0)``: an entry that is masked is zero even if it was NaN. Gradients are masked before
    they are clipped, so that masked entries do not count in norms; params after each step.

    `masks`: what `prune` returned; leaves without a mask, and ``None``, stay as they are. Raises
    `UnknownName` for a mask without its leaf, `InvalidArgument` for one that does not fit.

    >>> masked({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})["w"].tolist()
    [1.0, 0.0]
    """
    return masked_by(tree, masks, zeroed, where="jax.masked")


def straight_through(params: Any, masks: Mapping[str, Any]) -> Any:
    """Return `masked` params whose derivatives are those of params that are not masked; for the inside of a loss.

    ``where(mask, leaf, 0)`` with the derivative 1 everywhere, so that weights which are masked go on learning, and
    may come back when masks are made anew: see ``pruned(straight_through=True)`` and `masks_at`. Raises what
    `masked` raises.

    >>> loss = lambda own: straight_through(own, {"w": jnp.array([True, False])})["w"] @ jnp.array([1.0, 2.0])
    >>> value, slopes = jax.value_and_grad(loss)({"w": jnp.ones(2)})
    >>> float(value), slopes["w"].tolist()
    (1.0, [1.0, 2.0])

    Source: Bengio, Leonard and Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation".
    """
    return masked_by(params, masks, _straight, where="jax.straight_through")


@jax.custom_jvp
def _straight(mask: Any, leaf: jax.Array) -> jax.Array:
    return zeroed(mask, leaf)


@_straight.defjvp
def _straight_jvp(primals: Any, tangents: Any) -> Any:
    return _straight(*primals), tangents[1]


def zeroed(mask: Any, leaf: jax.Array) -> jax.Array:
    """Return a leaf with ``+0.0`` where its mask is false."""
    return jnp.where(mask, leaf, jnp.zeros_like(leaf))


def masked_by(tree: Any, masks: Mapping[str, Any], how: How, *, where: str) -> Any:
    """Return a tree whose leaves with a mask are ``how(mask, leaf)``; raises what `masked` raises."""
    found = leaves_of(tree, where=where)
    check_masks(masks, found, where=where, leaf="leaf")
    for name, leaf in named({name: found[name] for name in masks}, where=where).items():
        if leaf is not None:
            found[name] = how(masks[name], leaf)
    return replaced(tree, found)


def masked_moments(state: Any, params: Any, masks: Mapping[str, Any]) -> Any:
    """Return an optimizer's state with its moments of masked weights at zero; runs under ``jit``.

    Every part of the state with the structure of `params` and floating leaves is masked like them: the
    moments of optax's optimizers, the traces of momentum; leaves that ``optax.masked`` and
    ``optax.multi_transform`` left out (``optax.MaskedNode``) may be missing. The rest, counters and
    parts of another structure, is returned as it is. `masked` weights stay at zero without it; it is for
    optimizers that continue with other masks.

    Raises what `masked` raises.

    >>> import optax
    >>> params = {"w": jnp.ones(2)}
    >>> state = optax.adam(0.1).init(params)[0]._replace(mu={"w": jnp.ones(2)})
    >>> masked_moments(state, params, {"w": jnp.array([True, False])}).mu["w"].tolist()
    [1.0, 0.0]
    """
    return moments_by(state, params, masks, zeroed)


def moments_by(state: Any, params: Any, masks: Mapping[str, Any], how: How) -> Any:
    """Return an optimizer's state with its moments changed by ``how(mask, moment)``; see `masked_moments`."""
    where = "jax.masked_moments"
    leaves = leaves_of(params, where=where)
    check_masks(masks, leaves, where=where, leaf="leaf")

    def like_params(part: Any) -> bool:
        leaves, structure = jax.tree.flatten(part, is_leaf=_left_out)
        try:
            beside = structure.flatten_up_to(params)
        except ValueError:
            return False
        return all(
            _left_out(leaf)
            or (is_floating(leaf) and is_floating(other) and jnp.shape(leaf) == jnp.shape(other))
            for leaf, other in zip(leaves, beside, strict=True)
        )

    def masked_part(part: Any) -> Any:
        there = leaves_of(part, where=where)
        own = {name: mask for name, mask in masks.items() if name in there}
        return masked_by(part, own, how, where=where)

    return jax.tree.map(
        lambda part: masked_part(part) if like_params(part) else part, state, is_leaf=like_params
    )


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
    only where ``schedule.due(step)``. Its whole state is the masks and the number of the step: saved and
    passed again, training continues as if it had not stopped.

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
        found = leaves_of(params, where=where)
        check_masks(masks, found, where=where, leaf="leaf")
        # Compiled for leaves with a mask alone: others may be of types that jit does not accept.
        there = _masked({name: found[name] for name in masks}, dict(masks))
        return replaced(params, found | there), dict(masks)
    request = scheduled(where, schedule, step, facts=facts)
    masks = None if schedule.from_all else masks
    return _pruned(params, request, Beside(layouts, coupled, masks))


_masked = jax.jit(masked)


def _left_out(node: Any) -> bool:
    """Return whether this is the empty tuple ``optax.MaskedNode``, in place of a leaf that is left out."""
    return isinstance(node, tuple) and not node
