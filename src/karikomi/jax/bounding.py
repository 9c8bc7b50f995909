"""Bound weights: as the last transform of an optax chain, or by projecting the parameters themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.core import Tracer

from karikomi.bound import spared
from karikomi.errors import InvalidArgument, NonFinite
from karikomi.functional.bounding import (
    Bounded,
    BoundPlan,
    bound_named,
    check_bound,
    fresh_bound_state,
    plan_bound,
    share_at_bound,
)
from karikomi.functional.unit_axes import UnitAxes, resolved_axes, resolved_fan_ins
from karikomi.jax.clipping import check_real, strong
from karikomi.jax.library import library
from karikomi.jax.pytrees import named, replaced, shapes
from karikomi.rule import Rule, Scope, order_of
from karikomi.rules.outcome import Outcome


class BoundState(NamedTuple):
    """The state of a bound: counters and the state of its rule."""

    rule: dict[str, jax.Array]


def bound(
    rule: Rule,
    *,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    unit_axes: UnitAxes | None = None,
    fan_in: Mapping[str, int] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return an optax transform that changes updates so that weights stay within a bound; put it last.

    ``update = bounded(params + update) - params``: after ``optax.apply_updates`` weights are within the
    bound but for the rounding of that sum. `project` has none.

    `rule`: of `karikomi.bound`. `unit_axes`: for rules per unit, name or glob -> the axis (or axes) of one output
    unit; for Flax ``{"*kernel": -1}``. `fan_in`: for `InitScaled`, name or glob -> how many inputs feed one
    output. Arrays without an entry are left alone. Weights that are not finite are left as they are.

    `only`, `exclude`: names or globs. Without `only`, rules per entry and per tensor spare the gains and running
    statistics of normalisation layers, which are recognised by name (``BatchNorm_0.scale``, ``gamma``);
    ``only="*"`` takes all. The state then has an entry ``spared``: one from before lacks it, and
    continues to bound all; restored into a target, it needs that of ``only="*"``.

    Raises `Unsupported` for `SpectralCap` and `QKClip`, which need more than norms and sizes, and
    `InvalidArgument` without parameters and for axes that do not fit.

    >>> import jax.numpy as jnp, optax, karikomi as kk
    >>> tx = optax.chain(optax.sgd(1.0), bound(kk.bound.Clamp(0.5)))
    >>> params = {"w": jnp.zeros(2)}
    >>> updates, _ = tx.update({"w": jnp.array([-9.0, 0.25])}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [0.5, -0.25]
    """
    own = _Bound(rule, only, exclude, unit_axes, fan_in, where="jax.bound")

    def init(params: Any) -> BoundState:
        found = named(params, where=own.where)
        return BoundState(own.fresh(own.plan(found, own.left_alone(found, None))))

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, BoundState]:
        if params is None:
            raise InvalidArgument(
                "a bound acts on weights",
                where=own.where,
                got="params=None",
                hint="pass them: tx.update(grads, state, params)",
            )
        weights = named(params, where=f"{own.where} (params)")
        moves = named(updates, where=own.where)
        moved = {
            name: weight + moves[name].astype(weight.dtype)  # type: ignore[union-attr]
            for name, weight in weights.items()
            if weight is not None and moves.get(name) is not None
        }
        plan = own.plan(moved, own.left_alone(weights, state.rule))
        done = bound_named(plan, moved, spared.without_mark(state.rule), library=library())
        changed = {n: (a - weights[n]).astype(moves[n].dtype) for n, a in done.arrays.items()}  # type: ignore[union-attr]
        return replaced(updates, changed), BoundState({**state.rule, **done.state})

    return optax.GradientTransformationExtraArgs(init, update)


def project(
    params: Any,
    rule: Rule,
    state: BoundState | None = None,
    *,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    unit_axes: UnitAxes | None = None,
    fan_in: Mapping[str, int] | None = None,
) -> tuple[Any, Outcome, BoundState]:
    """Return ``(bounded params, outcome, state)``, to be called after ``optax.apply_updates``.

    Arguments and errors are those of `bound`. `state`: for limits that are schedules, the state that the last call
    returned. Under ``jit`` the outcome cannot be returned; use it inside. Raises `NonFinite`,
    naming the array, for weights that are not finite, where values are known.

    >>> import jax.numpy as jnp, karikomi as kk
    >>> params, outcome, _ = project({"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])},
    ...                              kk.bound.MaxNorm(2.5), unit_axes={"w": 0})
    >>> params["w"].tolist(), outcome.share_at_bound
    ([[1.5, 2.0], [0.0, 1.0]], 0.5)
    """
    own = _Bound(rule, only, exclude, unit_axes, fan_in, where="jax.project")
    found = named(params, where=own.where).items()
    weights = {name: array for name, array in found if array is not None}
    plan = own.plan(weights, own.left_alone(weights, None if state is None else state.rule))
    before = own.fresh(plan) if state is None else state.rule
    done = bound_named(plan, weights, spared.without_mark(before), library=library())
    known = not isinstance(done.norms, Tracer)
    if known:
        _check_finite(plan, done, own.where)
    outcome = Outcome(
        names=plan.stage.owners,
        norms=done.norms,
        after=done.after,
        skipped=False,
        element_wise=rule.scope is Scope.ELEMENT,
        left_alone=plan.left_alone,
        share_at_bound=share_at_bound(plan, done, attempted=int(before["attempted"]))
        if known
        else None,
        order=order_of(rule),
    )
    return replaced(params, done.arrays), outcome, BoundState({**before, **done.state})


class _Bound:
    """A rule with the arrays that it is for, their unit axes and fan-ins."""

    def __init__(
        self,
        rule: Rule,
        only: str | Sequence[str] | None,
        exclude: str | Sequence[str] | None,
        unit_axes: UnitAxes | None,
        fan_in: Mapping[str, int] | None,
        *,
        where: str,
    ) -> None:
        check_bound(rule, where=where)
        self.rule, self.unit_axes, self.fan_in, self.where = rule, unit_axes, fan_in, where
        self.only, self.exclude = only, exclude

    def left_alone(
        self, found: Iterable[str], state: Mapping[str, jax.Array] | None
    ) -> dict[str, str]:
        spare = spared.spares(self.rule, self.only, state)
        gains = spared.by_name(found) if spare else {}
        return spared.left_alone(
            found, gains, only=self.only, exclude=self.exclude, where=self.where
        )

    def plan(
        self, found: Mapping[str, jax.Array | None], left_alone: Mapping[str, str]
    ) -> BoundPlan:
        known = shapes(found)
        if self.rule.scope is Scope.ELEMENT or "distance" in self.rule.needs:
            check_real(found, where=self.where)
        axes = resolved_axes(self.unit_axes, known, where=self.where)
        inputs = resolved_fan_ins(self.fan_in, known, where=self.where)
        return plan_bound(self.rule, known, axes, inputs, left_alone=left_alone, where=self.where)

    def fresh(self, plan: BoundPlan) -> dict[str, jax.Array]:
        state = fresh_bound_state(plan, library=library())
        # Only where it matters: an entry more is another structure of the checkpoint.
        spares = spared.spares(self.rule, self.only) and bool(spared.by_name(plan.left_alone))
        return strong(state | ({spared.SPARED: np.ones((), bool)} if spares else {}))


def _check_finite(plan: BoundPlan, done: Bounded, where: str) -> None:
    pairs = zip(plan.stage.owners, np.isfinite(np.asarray(done.norms)), strict=True)
    culprits = sorted({name for name, finite in pairs if not finite})
    if culprits:
        raise NonFinite(f"non-finite entries in {', '.join(culprits[:5])}", where=where)
