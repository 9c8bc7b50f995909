"""Train with masks: an optimizer whose weights are pruned, or pruned and regrown, inside of ``jit``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.jax.clipping import ClipState, check_real
from karikomi.jax.library import library
from karikomi.jax.pruning import Masks, masked_by, moments_by
from karikomi.jax.pytrees import leaves_of, named, replaced
from karikomi.jax.sparse_training.mask_plan import SHOWN, Facts, MaskPlan, check_supported, plan_of
from karikomi.prune import Layout
from karikomi.prune.schedules.pruning_schedule import PruningSchedule, check_fields
from karikomi.selection.array_arguments import check_masks

Leaves = dict[str, jax.Array]


class PrunedState(NamedTuple):
    """The state of masks, and that of the optimizer that they are around: a pytree that any checkpoint takes.

    `steps`: attempted so far. `seen`: the last of them after which all due masks were made; it stays behind
    while weights, gradients or scores are not finite. `masks`: name -> bool array. `facts`: fact -> name -> its
    sum over the `shown` steps since the last masks, for scores that need gradients; else empty.
    """

    steps: jax.Array
    seen: jax.Array
    masks: Any
    facts: Any
    shown: jax.Array
    inner: Any


def pruned(
    optimizer: optax.GradientTransformation,
    prune: PruningSchedule | Mapping[str, Any],
    *,
    masks: Mapping[str, Any] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    straight_through: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer whose weights are masked, by a schedule or by masks that do not change.

    The compiled loop stays as it was: ``optax.apply_updates(params, updates)`` gives weights that are exactly
    zero where a mask is false. In each step gradients of masked weights become zero before `optimizer` gets
    them, and count in no norm; where the schedule is due, masks are then made from the weights after the step,
    on the device, and moments of masked weights are zero from the next step on. A step that `clipped` or
    ``optax.apply_if_finite`` inside of it skips, or whose weights are not finite, changes no mask: those that are
    due are made after the next one, to the sparsity that was due (see `check`).

    `prune`: a schedule of `karikomi.prune` (`OneShot`, `Gradual`, `Iterative`, `SET`, `RigL`), whose ``only=``
    and ``exclude=`` are globs over names, such as ``"*kernel"``; or masks such as `prune` returns. Steps count
    from 1, and what is due at step 0 is done after the first. `masks`: that exist before the first step: the
    first masks of SET and RigL; for the others, what is gone already. `layouts`: name or glob -> axes, for
    `NofM`; for Flax ``{"*kernel": kk.prune.Layout(units=-1, inputs=-2)}``. `straight_through`: weights,
    gradients and moments stay dense, masks are made from all weights each time, and the loss takes
    `straight_through` of the params.

    Masks are those of `karikomi.numpy.prune`, ties included, for the weights, scores and sparsity of the step;
    random numbers are drawn by `jax.random` from (seed, step, name), so others than in NumPy. Runs under
    ``jit``, ``scan``, ``vmap`` (masks per network; there they are made at every step, and taken where they are
    due) and on sharded arrays. Put ``optax.MultiSteps`` around it, not inside.

    Raises `Unsupported` for scores, patterns and allocations that need more than a weight and its gradient
    (`prune` and `update_masks` make such masks between steps), for rewinding, and for more than 2^31 weights
    under one threshold; `InvalidArgument` and `UnknownName` for what does not fit.

    >>> import karikomi as kk
    >>> tx = pruned(optax.sgd(1.0), kk.prune.OneShot(0.5, step=2))
    >>> params = {"w": jnp.array([4.0, 3.0, 2.0, 1.0])}
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = jax.jit(tx.update)({"w": jnp.full(4, 0.25)}, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["w"].tolist())
    [3.75, 2.75, 1.75, 0.75]
    [3.5, 2.5, 0.0, 0.0]
    [3.25, 2.25, 0.0, 0.0]

    Source: Zhu and Gupta 2017 (gradual); Mocanu et al. 2018 (SET); Evci et al. 2020 (RigL); Bengio, Leonard and
    Courville 2013 (straight-through). RigL's paper skips the gradient step where weights move; here it is taken.
    """
    where = "jax.pruned"
    if not isinstance(
        optimizer, optax.GradientTransformation | optax.GradientTransformationExtraArgs
    ):
        raise InvalidArgument("not an optax optimizer", where=where, got=repr(optimizer)[:80])
    own = _Pruned(optimizer, prune, masks, layouts, dense=straight_through, where=where)
    return optax.GradientTransformationExtraArgs(own.init, own.update)


def masks_at(
    params: Any,
    schedule: PruningSchedule,
    step: Any,
    *,
    layouts: Mapping[str, Layout] | None = None,
    facts: Facts | None = None,
) -> Masks:
    """Return the masks that a schedule makes of these params by a step, from all weights; runs under ``jit``.

    Those of the last step at or before `step` (a number, also a traced one) at which the schedule changes
    masks; before the first, all true. `facts`: fact -> name -> array, for scores that need gradients. Where a
    score is not finite all masks are true, so that the NaN is seen. Other arguments and errors: see `pruned`.

    >>> import karikomi as kk
    >>> rule = kk.prune.Gradual(0.8, steps=(0, 4), every=2)
    >>> masks = jax.jit(lambda p, step: masks_at(p, rule, step))
    >>> [int(masks({"w": jnp.arange(10.0)}, step)["w"].sum()) for step in range(6)]
    [10, 10, 3, 3, 2, 2]

    Source: Bengio, Leonard and Courville 2013; with `straight_through`, masks that follow the weights.
    """
    where = "jax.masks_at"
    check_fields(schedule, where=where)
    own = _Pruned(optax.identity(), schedule, None, layouts, dense=True, where=where, first=0)
    found = leaves_of(params, where=where)
    plan = own.plan(found)
    weights = own.weights(found, plan)
    every = {name: jnp.ones(weight.shape, bool) for name, weight in weights.items()}
    given = {} if facts is None else facts
    if missing := sorted({*plan.facts} - given.keys()):
        raise InvalidArgument(
            "the score needs facts", where=where, got="none", allowed=", ".join(missing)
        )
    if not jnp.issubdtype(getattr(step, "dtype", type(step)), jnp.integer):
        raise InvalidArgument(
            "a step is a whole number", where=f"{where}: step", got=repr(step)[:80]
        )
    row = plan.row(jnp.asarray(step, jnp.int32))
    made, good = plan.made(weights, every, dict(given), jnp.maximum(row, 0))
    return {name: mask | ~(good & (row >= 0)) for name, mask in made.items()}


def masks(state: Any) -> Masks:
    """Return the masks in an optimizer's state, at any depth: name -> bool array; runs under ``jit``.

    For a loss with `straight_through`, for `masked`, and for counting. Raises `InvalidArgument` for a state with
    none, or several.

    >>> import karikomi as kk
    >>> tx = optax.chain(pruned(optax.sgd(0.1), {"w": jnp.array([True, False])}))
    >>> masks(tx.init({"w": jnp.ones(2)}))["w"].tolist()
    [True, False]
    """
    found = pruned_states(state)
    if len(found) != 1:
        raise InvalidArgument(
            "the state must contain the masks of exactly one `pruned`",
            where="jax.masks",
            got=f"{len(found)}",
            hint="pass the part of the state with one" if found else None,
        )
    return dict(found[0].masks)


def pruned_states(state: Any) -> list[PrunedState]:
    """Return every `PrunedState` in a state."""
    leaves = jax.tree.leaves(state, is_leaf=lambda value: isinstance(value, PrunedState))
    return [leaf for leaf in leaves if isinstance(leaf, PrunedState)]


class _Pruned:
    """Masks around an optimizer."""

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        prune: Any,
        given: Mapping[str, Any] | None,
        layouts: Mapping[str, Layout] | None,
        *,
        dense: bool,
        where: str,
        first: int = 1,
    ) -> None:
        fixed = isinstance(prune, Mapping)
        self.schedule: PruningSchedule | None = None if fixed else prune
        self.given = prune if fixed else given
        self.inner = optax.with_extra_args_support(optimizer)
        self.layouts, self.dense, self.where, self.first = layouts, dense, where, first
        self.anew = dense
        self._plans: dict[Any, MaskPlan] = {}
        if fixed and given is not None:
            raise InvalidArgument("masks are given twice", where=where, got="prune= and masks=")
        if self.schedule is not None:
            check_fields(self.schedule, where=where)
            check_supported(self.schedule, where=where)
            # Where sparsity falls, what is gone comes back.
            self.anew = dense or self.schedule.from_all
            if dense and (self.schedule.regrows_by is not None or given is not None):
                raise Unsupported(
                    "straight-through masks are made anew from all weights each time",
                    where=where,
                    got=type(self.schedule).__name__ if given is None else "masks=",
                    allowed="OneShot, Gradual, Iterative without rewind",
                )

    def plan(self, found: Mapping[str, Any]) -> MaskPlan:
        """Return the plan for a tree of these leaves, the same one each time."""
        if self.schedule is None:
            raise InvalidArgument("masks have no schedule", where=self.where)
        known = {name: leaf for name, leaf in found.items() if leaf is not None}
        shapes = {name: tuple(np.shape(leaf)) for name, leaf in known.items()}
        key = tuple(shapes.items())
        if key not in self._plans:
            check_masks(self.given or {}, known, where=self.where, leaf="leaf")
            self._plans[key] = plan_of(
                self.schedule,
                shapes,
                layouts=self.layouts,
                given=None if self.anew else self.given,
                anew=self.anew,
                first=self.first,
                where=self.where,
            )
        return self._plans[key]

    def weights(self, found: Mapping[str, Any], plan: MaskPlan) -> Leaves:
        """Return the leaves that are masked; raises `InvalidArgument` for one that is not floating."""
        chosen: Any = named({name: found[name] for name in plan.names}, where=self.where)
        check_real(chosen, where=self.where)
        return chosen

    def init(self, params: Any) -> PrunedState:
        found = leaves_of(params, where=self.where)
        step = [jnp.array(value, jnp.int32) for value in (0, -1, 0)]
        inner = self.inner.init(params)
        # An empty tree of optax is the placeholder of `optax.tree.map_params`.
        if not found and type(params).__module__.startswith("optax."):
            facts = {fact: params for fact in self._facts()}
            return PrunedState(step[0], step[1], params, facts, step[2], inner)
        if self.schedule is None:
            check_masks(self.given, found, where=self.where, leaf="leaf")
            own = {name: jnp.array(mask, bool) for name, mask in (self.given or {}).items()}
            return PrunedState(step[0], step[1], own, {}, step[2], inner)
        plan = self.plan(found)
        weights = self.weights(found, plan)
        own = {
            name: jnp.array(self.given[name], bool)
            if self.given and name in self.given
            else jnp.ones_like(weight, bool)
            for name, weight in weights.items()
        }
        facts = {
            fact: {n: jnp.zeros_like(w, jnp.float32) for n, w in weights.items()}
            for fact in plan.facts
        }
        return PrunedState(step[0], step[1], own, facts, step[2], inner)

    def _facts(self) -> tuple[str, ...]:
        needs = set() if self.schedule is None else self.schedule.scored_by().needs & SHOWN.keys()
        return tuple(sorted(needs))

    def update(
        self, updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, PrunedState]:
        if params is None:
            raise InvalidArgument(
                "masks act on weights",
                where=self.where,
                got="params=None",
                hint="pass them: tx.update(grads, state, params)",
            )
        found, moves = (leaves_of(tree, where=self.where) for tree in (params, updates))
        self._check_state(state, found)

        def step(zero: Any) -> tuple[Any, Any]:
            if self.dense:
                return self.inner.update(updates, state.inner, params, **extra)
            how = lambda mask, leaf: jnp.where(mask, leaf, jnp.asarray(zero, leaf.dtype))  # noqa: E731
            own = _present(state.masks, moves)
            grads = masked_by(updates, own, how, where=self.where)
            if self.schedule is None:
                return self.inner.update(grads, state.inner, params, **extra)
            # Moments are masked as they enter: masked as they leave, they would be one more array in memory.
            held = moments_by(state.inner, params, state.masks, how)
            return self.inner.update(grads, held, params, **extra)

        if self.schedule is None:
            after = state._replace(steps=state.steps + 1, seen=state.steps + 1)
            changes, inner = step(0.0)
        else:
            after, changes, inner = self._followed(state, found, updates, step)
        changes = changes if self.dense else self._held(changes, found, after.masks)
        return changes, after._replace(inner=inner)

    def _followed(
        self, state: PrunedState, found: Any, updates: Any, step: Any
    ) -> tuple[PrunedState, Any, Any]:
        """Return ``(state with masks as the schedule requires them after a step, and what the step returned)``.

        Where masks are due, the step is taken twice, the first time only to make them from the weights after it: what
        passes through a condition is copied, at every step of the training.
        """
        plan, state = self.plan(found), state._replace(steps=state.steps + 1)
        weights, moves = self.weights(found, plan), leaves_of(updates, where=self.where)
        gradients: Any = named(_present(dict.fromkeys(plan.names), moves), where=self.where)
        row = plan.row(state.steps)
        pending = (row >= 0) & (jnp.asarray((*plan.due, -1), jnp.int32)[row] > state.seen)

        def renewed() -> list[jax.Array]:
            changes, inner = step(0.0)
            facts, shown, fit = _added(plan, state, gradients, skipped(inner))
            weighed = self._after(weights, changes, state.masks)
            means = {
                fact: {name: total / jnp.maximum(shown, 1) for name, total in sums.items()}
                for fact, sums in facts.items()
            }
            made, good = self._renewed(plan, state, weighed, gradients, means, row)
            good = good & fit
            chosen = [jnp.where(good, made[name], state.masks[name]) for name in state.masks]
            return [jnp.where(good, state.steps, state.seen), *chosen]

        def same() -> list[jax.Array]:
            return [state.steps, *state.masks.values()]

        seen, *own = library().cond(pending, renewed, same)
        # A zero that comes out of the condition: what it masks is computed after it. The condition reads the
        # moments, and if they were written before, they would be copied first. A barrier is not kept on CPUs.
        changes, inner = step(jnp.where(seen < -1, 1.0, 0.0))
        facts, shown, _ = _added(plan, state, gradients, skipped(inner))
        made = pending & (seen == state.steps)
        state = state._replace(
            seen=seen,
            masks=dict(zip(state.masks, own, strict=True)),
            facts=jax.tree.map(lambda total: jnp.where(made, 0.0, total), facts),
            shown=jnp.where(made, 0, shown),
        )
        return state, changes, inner

    def _renewed(
        self, plan: MaskPlan, state: PrunedState, weights: Any, gradients: Any, facts: Any, row: Any
    ) -> tuple[Any, jax.Array]:
        kept = state.masks
        if self.anew:
            kept = {name: jnp.ones_like(mask) for name, mask in kept.items()}
        if plan.schedule.regrows_by is None:
            return plan.made(weights, kept, facts, row)

        def first() -> list[jax.Array]:
            made, good = plan.made(weights, kept, facts, row)
            return [good, *(made[name] for name in kept)]

        def later() -> list[jax.Array]:
            made, good = plan.moved(weights, kept, gradients, row)
            return [good, *(made[name] for name in kept)]

        if self.given is not None:
            good, *own = later()
        else:
            good, *own = library().cond(state.seen < plan.counts.due[0], first, later)
        return dict(zip(kept, own, strict=True)), good

    def _after(self, weights: Leaves, changes: Any, kept: Mapping[str, jax.Array]) -> Leaves:
        """Return the weights after a step, as `optax.apply_updates` makes them, masked as before it."""
        moves = leaves_of(changes, where=self.where)
        after = {
            name: weight if moves.get(name) is None else (weight + moves[name]).astype(weight.dtype)
            for name, weight in weights.items()
        }
        if self.dense:
            return after
        return {name: jnp.where(kept[name], new, 0.0) for name, new in after.items()}

    def _held(self, changes: Any, found: Mapping[str, Any], kept: Mapping[str, Any]) -> Any:
        """Return updates after which masked weights are zero: ``weight + -weight`` is, exactly."""
        moves = leaves_of(changes, where=self.where)
        for name, weight in named({name: found[name] for name in kept}, where=self.where).items():
            if moves.get(name) is None or weight is None:
                continue
            # In the type of the weight, where that of the update would round it.
            dtype = jnp.promote_types(moves[name].dtype, weight.dtype)
            moves[name] = jnp.where(kept[name], moves[name].astype(dtype), -weight.astype(dtype))
        return replaced(changes, moves)

    def _check_state(self, state: Any, found: Mapping[str, Any]) -> None:
        if not isinstance(state, PrunedState):
            raise InvalidArgument(
                "not the state of `pruned`",
                where=self.where,
                got=type(state).__name__,
                hint="make it with init(params) of this transform",
            )
        check_masks(state.masks, found, where=f"{self.where} (state)", leaf="leaf")
        expected = {*(self.given or {})} if self.schedule is None else {*self.plan(found).names}
        if {*state.masks} != expected:
            raise InvalidArgument(
                "this state is of other arrays or of another schedule",
                where=self.where,
                got=", ".join([*state.masks][:5]) or "nothing",
                allowed=", ".join(sorted(expected)[:5]) or "nothing",
                hint="make it with init(params) of this transform",
            )


def _added(
    plan: MaskPlan, state: PrunedState, gradients: Leaves, missed: jax.Array
) -> tuple[Any, jax.Array, jax.Array]:
    """Return ``(sums of facts, number of their steps, whether this step was fit to be counted)``."""
    fit = ~missed
    if not plan.facts:
        return state.facts, state.shown, fit
    wide = {name: slope.astype(jnp.float32) for name, slope in gradients.items()}
    terms = {
        fact: {name: SHOWN[fact](slope) for name, slope in wide.items()} for fact in plan.facts
    }
    for flag in [jnp.all(jnp.isfinite(term)) for own in terms.values() for term in own.values()]:
        fit = fit & flag
    last = max(plan.counts.due, default=-1)
    counts = fit & ((state.steps <= last) | (state.seen < last))
    sums = {
        fact: {
            name: jnp.where(counts, total + terms[fact].get(name, 0.0), total)
            for name, total in state.facts[fact].items()
        }
        for fact in plan.facts
    }
    return sums, state.shown + counts, fit


def skipped(inner: Any) -> jax.Array:
    """Return whether the optimizer inside has skipped its step, by what can skip: `clipped`, `apply_if_finite`."""
    kinds = (ClipState, optax.ApplyIfFiniteState)
    flags = [jnp.array(False)]
    for leaf in jax.tree.leaves(inner, is_leaf=lambda value: isinstance(value, kinds)):
        if isinstance(leaf, ClipState):
            flags.append(jnp.any(leaf.skipped))
        elif isinstance(leaf, optax.ApplyIfFiniteState):
            flags.append(~leaf.last_finite)
    return jnp.any(jnp.stack(flags))


def _present(values: Mapping[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """Return those whose leaf is there, with the values of `beside` where they have none of their own."""
    return {
        name: beside[name] if value is None else value
        for name, value in values.items()
        if beside.get(name) is not None
    }
