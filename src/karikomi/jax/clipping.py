"""Clip updates inside of an optax chain, or around an optimizer whose steps can then be skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.functional.clipping import Companions, StepResult, clip_named, fresh_state
from karikomi.functional.outcomes import as_bytes, described, from_bytes
from karikomi.functional.unit_axes import UnitAxes, axes_for, plan_for
from karikomi.jax.library import library
from karikomi.jax.pytrees import named, replaced, shapes
from karikomi.rule import Composite, Quantity, Rule
from karikomi.rules import decide
from karikomi.rules.stages import Stage


class ClipState(NamedTuple):
    """The state of a clip: a pytree of small arrays that any checkpoint takes.

    `rule`: counters and the state of the rule. `numbers`: measured in the last step, before and after,
    shape (2, numbers) for each stage. `labels`: the description of the stages as bytes, stored as an array
    so that it is kept with the others. `moments`: running means of squares, for rules that need them.
    """

    rule: dict[str, jax.Array]
    numbers: tuple[jax.Array, ...]
    skipped: jax.Array
    labels: jax.Array
    moments: Any


class ClippedState(NamedTuple):
    """The state of a clip, and that of the optimizer that it wraps."""

    clip: ClipState
    inner: Any


def clip(
    rule: Rule | Composite, *, nonfinite: str = "skip", unit_axes: UnitAxes | None = None
) -> optax.GradientTransformationExtraArgs:
    """Return an optax transform that clips updates; put it before the optimizer.

    ``optax.chain(kk.jax.clip(rule), optax.adamw(1e-3))``. Rules on updates (`BlockRMS`) are placed after the
    transforms that compute the update and before the learning rate.

    `rule`: of `karikomi.clip`. `nonfinite`: the policy for a step with NaN or infinite entries. ``skip``
    (default) zeros all updates, so that weights stay, but the moments of an optimizer after it still
    move: `clipped` can skip the step. ``zero`` zeros the bad arrays alone, ``zero_entries`` their bad entries alone,
    ``pass`` leaves them, ``raise`` raises `NonFinite` where values are known, and is ``skip`` under ``jit``: then
    `check` the state. `unit_axes`: for rules per unit, name or glob -> the axis whose index is one output unit, or
    the axes; for Flax ``{"*kernel": -1}``. An array without an entry is one unit. Names are paths joined with dots
    (``params.Dense_0.kernel``). Statistics are kept in float32 unless ``jax_enable_x64`` is on.

    Works under ``jit``, ``scan``, ``vmap`` (a state per network) and on sharded arrays. Raises `Unsupported` for a rule
    that exists to skip steps (`SkipSpikes`), and `InvalidArgument` for arrays that are not floating.

    >>> import jax.numpy as jnp, optax, karikomi as kk
    >>> tx = optax.chain(clip(kk.clip.ByGlobalNorm(1.0)), optax.sgd(1.0))
    >>> params = {"w": jnp.zeros(4)}
    >>> updates, state = tx.update({"w": jnp.full(4, 10.0)}, tx.init(params), params)
    >>> updates["w"].tolist(), kk.jax.outcome(state).pre
    ([-0.5, -0.5, -0.5, -0.5], 20.0)
    """
    inner = _Clip(rule, nonfinite, unit_axes, where="jax.clip")
    for leaf in decide.leaves(rule):
        if getattr(leaf, "skips", False):
            raise Unsupported(
                f"{type(leaf).__name__} exists to skip steps, which a transform cannot do",
                where="jax.clip",
                hint="kk.jax.clipped(optimizer, rule) can",
            )

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        passed, after = inner.step(updates, state, params, zero_skipped=True)
        return replaced(updates, passed.arrays), after

    return optax.GradientTransformationExtraArgs(inner.init, update)


def clipped(
    optimizer: optax.GradientTransformation,
    rule: Rule | Composite,
    *,
    nonfinite: str = "skip",
    unit_axes: UnitAxes | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer whose gradients are clipped and whose step is skipped where the rule or policy skips it.

    A skipped step leaves weights, moments and step counts of `optimizer` as they are. Arguments and
    errors are those of `clip`; here rules that skip steps are supported, and rules on updates are not.
    Around it, `optax.MultiSteps` keeps a NaN in its sum for ever, so that every later update is skipped: give it
    ``should_skip_update_fn=optax.skip_not_finite``, which leaves such a micro-batch out.

    >>> import jax.numpy as jnp, optax, karikomi as kk
    >>> tx = clipped(optax.adam(1e-3), kk.clip.AutoClip(10))
    >>> params = {"w": jnp.ones(2)}
    >>> updates, state = tx.update({"w": jnp.array([1.0, jnp.nan])}, tx.init(params), params)
    >>> updates["w"].tolist(), int(state.inner[0].count), kk.jax.outcome(state).nonfinite
    ([0.0, 0.0], 0, ('w',))
    """
    if getattr(rule, "of", None) is Quantity.UPDATE:
        raise Unsupported(
            f"{type(rule).__name__} acts on updates, which are inside of the optimizer",
            where="jax.clipped",
            hint="optax.chain(optax.scale_by_adam(), kk.jax.clip(rule), optax.scale_by_learning_rate(lr))",
        )
    if not isinstance(
        optimizer, optax.GradientTransformation | optax.GradientTransformationExtraArgs
    ):
        raise InvalidArgument(
            "not an optax optimizer", where="jax.clipped", got=repr(optimizer)[:80]
        )
    own = _Clip(rule, nonfinite, unit_axes, where="jax.clipped")
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> ClippedState:
        return ClippedState(own.init(params), inner.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, ClippedState]:
        passed, after = own.step(updates, state.clip, params, zero_skipped=False)
        moved, stepped = inner.update(
            replaced(updates, passed.arrays), state.inner, params, **extra
        )
        skip = passed.skip
        stay = lambda old, new: jnp.where(skip, old, new)  # noqa: E731
        moved = jax.tree.map(lambda move: stay(jnp.zeros_like(move), move), moved)
        return moved, ClippedState(after, jax.tree.map(stay, state.inner, stepped))

    return optax.GradientTransformationExtraArgs(init, update)


class _Clip:
    """A rule with the unit axes of the arrays: the step that both transforms share."""

    def __init__(
        self, rule: Rule | Composite, nonfinite: str, unit_axes: UnitAxes | None, *, where: str
    ) -> None:
        available = ["sizes", "weights"]
        if getattr(rule, "of", None) is not Quantity.UPDATE:
            available.append("second_moment")
        decide.check_rule(
            rule, Quantity.GRADIENT, Quantity.UPDATE, where=where, available=available
        )
        decide.check_policy(nonfinite, where=where)
        self.rule, self.nonfinite, self.unit_axes, self.where = rule, nonfinite, unit_axes, where
        leaves = decide.leaves(rule)
        self.needs = frozenset[str]().union(*(leaf.needs for leaf in leaves))

    def init(self, params: Any) -> ClipState:
        arrays, found = library(), named(params, where=self.where)
        # An empty tree of optax is the placeholder of `optax.tree.map_params`.
        is_placeholder = not found and type(params).__module__.startswith("optax.")
        plan, _ = self._plan({"array": jnp.zeros(())} if is_placeholder else found)
        moments = {}
        if "second_moment" in self.needs:
            moments = jax.tree.map(
                lambda a: jnp.zeros(jnp.shape(a), arrays.sums_in(jnp.abs(a).dtype)), params
            )
        numbers = tuple(jnp.zeros((2, sum(stage.counts)), arrays.wide) for stage in plan)
        rule = strong(fresh_state(plan, library=arrays))
        labels = jnp.asarray(as_bytes(described(plan)))
        return ClipState(rule, numbers, jnp.zeros((), bool), labels, moments)

    def step(
        self, updates: Any, state: ClipState, params: Any, *, zero_skipped: bool
    ) -> tuple[StepResult, ClipState]:
        found = named(updates, where=self.where)
        weights: dict[str, jax.Array | None] = {}
        if params is not None and (
            "weights" in self.needs or any(item is None for item in found.values())
        ):
            weights = named(params, where=f"{self.where} (params)")
        elif "weights" in self.needs:
            raise InvalidArgument(
                f"{type(self.rule).__name__} compares gradients with weights",
                where=self.where,
                got="params=None",
                hint="pass them: tx.update(grads, state, params)",
            )
        plan, axes = self._plan(found, weights)
        self._check_state(plan, state)
        for stage in plan:
            check_real({name: found[name] for name in stage.peaks}, where=self.where)
        moments = named(state.moments, where=self.where).items()
        passed = clip_named(
            plan,
            found,
            state.rule,
            Companions(axes, weights, {n: moment for n, moment in moments if moment is not None}),
            nonfinite=self.nonfinite,
            zero_skipped=zero_skipped,
            library=library(),
        )
        if self.nonfinite == "raise" and not isinstance(passed.bad, Tracer):
            self._check_finite(plan, passed)
        numbers = tuple(jnp.stack([stage.norms, stage.after]) for stage in passed.stages)
        moments = replaced(state.moments, passed.moments)
        return passed, ClipState(passed.state, numbers, passed.skip, state.labels, moments)

    def _plan(
        self,
        found: dict[str, jax.Array | None],
        beside: dict[str, jax.Array | None] | None = None,
    ) -> tuple[tuple[Stage, ...], dict]:
        known = shapes(found, beside)
        if not known:
            return (), {}
        # A placeholder for arrays has no axes.
        given = None if set(known) == {"array"} and known["array"] == () else self.unit_axes
        axes = axes_for(self.rule, given, known, where=self.where)
        return plan_for(self.rule, known, axes), axes

    def _check_state(self, plan: tuple[Stage, ...], state: ClipState) -> None:
        if not isinstance(state, ClipState):
            raise InvalidArgument(
                "not the state of a clip",
                where=self.where,
                got=type(state).__name__,
                hint="make it with init(params) of this transform",
            )
        expected = as_bytes(described(plan))
        same = state.labels.shape[-1:] == expected.shape
        if same and not isinstance(state.labels, Tracer):
            same = bool(np.all(np.asarray(state.labels) == expected))
        if not same:
            raise InvalidArgument(
                "this state is of other arrays or of another rule",
                where=self.where,
                got="unreadable labels"
                if isinstance(state.labels, Tracer)
                else _format_labels(state.labels),
                allowed=_format_labels(expected),
                hint="make it with init(params) of this transform",
            )

    def _check_finite(self, plan: tuple[Stage, ...], passed: StepResult) -> None:
        if bool(jnp.any(passed.bad)):
            pairs = zip(plan[0].owners, passed.stages[0].norms.tolist(), strict=True)
            culprits = dict.fromkeys(name for name, norm in pairs if not abs(norm) < float("inf"))
            raise NonFinite(
                f"non-finite entries in {', '.join(list(culprits)[:5])}", where=self.where
            )


def check_real(found: Mapping[str, jax.Array | None], *, where: str) -> None:
    """Raise `Unsupported` for complex entries where a rule acts entry by entry."""
    for name, array in found.items():
        if array is not None and jnp.iscomplexobj(array):
            raise Unsupported(
                "complex entries have no order to clamp by",
                where=f"{where}: {name}",
                hint="use a rule by norm",
            )


def strong(state: dict[str, Any]) -> dict[str, jax.Array]:
    """Return a state of strongly typed arrays with separate buffers."""
    # Weakly typed numbers would change their type in the first step, which `scan` does not allow; a buffer with
    # two names could not be donated.
    return {key: jnp.array(value, value.dtype, copy=True) for key, value in state.items()}


def _format_labels(labels: Any) -> str:
    names = [name for stage in from_bytes(labels) for name in stage["names"]]
    return ", ".join(names[:5]) or "nothing"
