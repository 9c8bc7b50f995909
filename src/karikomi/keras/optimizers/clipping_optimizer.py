"""An optimizer of Keras that clips gradients for another one, and skips steps.

Loss scale and accumulation are applied before the clip, which needs the gradient of a whole update; the
bound is applied after the step. All state is in Keras variables, so that every backend, compiler and file
format treats it like moments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from karikomi import spec
from karikomi.errors import InvalidArgument, NonFinite
from karikomi.functional.bounding import check_bound
from karikomi.functional.unit_axes import UnitAxes
from karikomi.keras import internals
from karikomi.keras.arrays.library import as_it_is, is_known, library
from karikomi.keras.arrays.variables import as_gradient, prepared, value_of
from karikomi.keras.clipping.named_clip import check_clip
from karikomi.keras.optimizers import accumulation, saved_state
from karikomi.keras.optimizers import inner_optimizer as inside
from karikomi.keras.optimizers.accumulation import PerUpdate
from karikomi.keras.optimizers.clip_variables import ClipVariables, fresh_entries, rules_for
from karikomi.keras.optimizers.outer_optimizer import OuterOptimizer
from karikomi.keras.optimizers.saved_state import ACCUMULATED, BOUND
from karikomi.rule import Array, Composite, Rule, State
from karikomi.rules import decide
from karikomi.rules.outcome import Outcome
from karikomi.schedule import whole_from

WHERE = inside.WHERE


def clipped(
    optimizer: Any,
    rule: Rule | Composite,
    *,
    bound: Rule | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    nonfinite: str = "skip",
    stop_after: int = 10,
    unit_axes: UnitAxes | Any = None,
    fan_in: Mapping[str, int] | None = None,
    name: str | None = None,
) -> ClippedOptimizer:
    """Return an optimizer of Keras that clips gradients and then lets `optimizer` step.

    ``model.compile(kk.keras.clipped(keras.optimizers.Adam(1e-3), kk.clip.AutoClip(10)))``, or any loop that calls
    ``apply``, ``apply_gradients`` or ``stateless_apply``, on TensorFlow, JAX or torch.

    A step that is not to be taken (`SkipSpikes`, or non-finite gradients under ``skip``) leaves weights,
    moments, averages and the step count of `optimizer` as they are. Its accumulation and loss scale
    are taken over: what is clipped is the average of a real update, in its true size. Under `tf.distribute`
    it is the sum over the replicas that is clipped, once.

    `rule`: of `karikomi.clip`. `bound`: of `karikomi.bound`, for the trained variables after every step that
    is taken. `only`, `exclude`: names or globs of paths for `bound`. Without `only`, rules per entry and per tensor
    spare the gains of normalisation layers, recognised by their paths (``gamma``, ``rms_norm/scale``); ``only="*"``
    takes all. `nonfinite`: ``skip`` (default), ``zero`` (only the bad tensors), ``zero_entries`` (only their bad
    entries), ``pass``, or ``raise``, which raises where values are known and is ``skip`` in compiled code.
    `stop_after`: after so many steps in a row with non-finite gradients `NonFinite` is raised, naming them: at once
    where values are known, else by ``check()`` and at the end of ``fit``. `unit_axes`: for rules per unit, name or
    glob of a path -> the axis whose index is one output unit, or the axes: ``{"*kernel": -1}``; or a built model, for
    the axes of its layers. `fan_in`: for `InitScaled`, likewise.

    ``.last`` and ``.last_bound`` are what the last step did. Variables of it hold all that was learned, and
    are saved with the model; ``import karikomi.keras`` before loading one, which keeps the names of variables
    that the rule knew. With mixed precision: ``LossScaleOptimizer(clipped(optimizer, rule))``, which
    ``compile`` makes by itself. With ``use_ema`` averages move once per update, where Keras alone moves them
    with every micro-batch; and as in Keras alone, to save, load and go on is then not exact.

    Raises `Unsupported` for an optimizer that clips itself, is clipped already or was given to another
    ``clipped`` before, or scales the loss around the clip, and for rules on updates; `InvalidArgument` for
    what is no optimizer.

    >>> import keras, karikomi as kk
    >>> weight = keras.Variable([1.0, 1.0], name="weight")
    >>> optimizer = clipped(keras.optimizers.SGD(1.0), kk.clip.ByNorm(0.5))
    >>> optimizer.apply([keras.ops.convert_to_tensor([3.0, 4.0])], [weight])
    >>> [round(float(x), 3) for x in weight.numpy()], optimizer.last.pre
    ([0.7, 0.6], 5.0)
    """
    return ClippedOptimizer(
        optimizer,
        rule,
        bound=bound,
        only=only,
        exclude=exclude,
        nonfinite=nonfinite,
        stop_after=stop_after,
        unit_axes=unit_axes,
        fan_in=fan_in,
        name=name,
    )


@keras.saving.register_keras_serializable(package="karikomi")
class ClippedOptimizer(OuterOptimizer):
    """The optimizer that `clipped` returns; arguments and errors are there."""

    where = WHERE

    def __init__(
        self,
        inner_optimizer: Any,
        rule: Rule | Composite,
        *,
        bound: Rule | None = None,
        only: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        nonfinite: str = "skip",
        stop_after: int = 10,
        unit_axes: UnitAxes | Any = None,
        fan_in: Mapping[str, int] | None = None,
        name: str | None = None,
    ) -> None:
        check_clip(rule, nonfinite, weights=True, where=WHERE)
        if bound is not None:
            check_bound(bound, where=f"{WHERE} (bound)")
        elif not (only is exclude is None):
            raise InvalidArgument(
                "only and exclude select what a bound affects, and there is none",
                where=WHERE,
                got=f"only={only!r}, exclude={exclude!r}",
                hint="clip some of the tensors: kk.clip.Groups({'*kernel': rule})",
            )
        stop_after = whole_from(1, stop_after, "stop_after must be >= 1", where=WHERE)
        inner = inside.checked_optimizer(inner_optimizer, ClippedOptimizer)
        super().__init__(inner, name)
        self.rule, self.bound, self.only, self.exclude = rule, bound, only, exclude
        self.nonfinite, self.stop_after = nonfinite, stop_after
        self.unit_axes, self.fan_in = inside.of_model(unit_axes, fan_in)
        self._skips = nonfinite in ("skip", "raise") or any(
            getattr(leaf, "skips", False) for leaf in decide.leaves(rule)
        )
        self._own: ClipVariables | None = None
        self._saved_variables: Any = ()
        # Both come before the clip.
        self.loss_scale_factor, self.gradient_accumulation_steps = inside.taken_over(inner)
        # Keras would make a variable that is assigned here one of its own.
        if inside.is_schedule(internals.learning_rate_of(inner)):
            self.learning_rate = internals.learning_rate_of(inner)

    def set_learning_rate(self, learning_rate: Any) -> None:
        """Set the learning rate of the inner optimizer, a schedule as one of updates."""
        steps = self.gradient_accumulation_steps
        if steps and inside.is_schedule(learning_rate):
            learning_rate = PerUpdate(learning_rate, steps)
        super().set_learning_rate(learning_rate)

    @property
    def steps(self) -> int:
        """Attempted updates, those that were skipped as well."""
        return 0 if self._own is None else self._own.steps()

    @property
    def last(self) -> Outcome | None:
        """What the clip did in the last update, ``None`` before the first one; reading waits for the device."""
        own = self._own
        if own is None or not own.clip.plan or not own.steps():
            return None
        return own.clip.outcome(own.state())

    @property
    def last_bound(self) -> Outcome | None:
        """What the bound did after the last step that was taken, ``None`` if there is none."""
        own = self._own
        if own is None or own.bound is None or not own.steps(BOUND):
            return None
        return own.bound.outcome(own.state(BOUND))

    def build(self, variables: Sequence[Any]) -> None:
        """Create the variables of both optimizers and of the clip for these trained variables, once."""
        if self.built:
            return
        variables = list(variables)
        names = inside.names_as_saved(variables, self._saved_variables)
        pairs = zip(names, variables, strict=True)
        weights = {n: v for n, v in pairs if not accumulation.is_overwritten(v)}
        clip, bound = rules_for(self, names, weights)
        super().build(variables)
        inside.check_parts(self.inner_optimizer, ClippedOptimizer)
        with self._branching.outside():
            state = fresh_entries(clip, bound, weights)
        entries = {key: self._entry(key, value) for key, value in state.items()}
        self._own = ClipVariables(names, weights, clip, bound, entries)

    @property
    def _learned(self) -> ClipVariables:
        own: Any = self._own  # there from `build` on, which every step begins with
        return own

    def _entry(self, key: str, value: np.ndarray) -> Any:
        start: Any = lambda shape, dtype=None: keras.ops.convert_to_tensor(value, dtype=dtype)  # noqa: E731
        return self.add_variable(
            shape=value.shape,
            initializer=start,
            dtype=str(value.dtype),
            name="clip_" + key.replace("/", "_").replace(".", "_"),
        )

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Clip gradients and take a step with them, or skip it."""
        grads = list(grads)
        if grads:
            # AutoGraph would rewrite the code of a tf.function, and has nothing to do here.
            as_it_is(self._apply)(grads, self.resolved(grads, trainable_variables))

    def _apply(self, grads: list[Any], variables: list[Any]) -> None:
        if all(grad is None for grad in grads):
            # This raises the error of Keras.
            self.inner_optimizer.apply(grads, variables)
        grads = [as_gradient(g, v) for g, v in zip(grads, variables, strict=True)]
        steps, scale = self.gradient_accumulation_steps, self.loss_scale_factor
        if scale is not None:
            grads = accumulation.quotients(grads, variables, scale)
        try:
            if not steps:
                self._update(grads, variables)
            else:
                self._branching.either(
                    (internals.apply_count(self) + 1) % steps == 0,
                    lambda arrays: self._update(
                        accumulation.quotients(self._sums(arrays, variables), variables, steps),
                        variables,
                    ),
                    lambda arrays: self._accumulate(arrays, variables),
                    grads,
                )
        except NonFinite:
            # The window of micro-batches has ended, and the next one begins with the next call.
            internals.apply_count(self).assign_add(1)
            raise
        internals.apply_count(self).assign_add(1)
        self._stop_if_due()

    def _sums(self, grads: list[Any], variables: list[Any]) -> list[Any]:
        places = [internals.place_of(self, variable) for variable in variables]
        return accumulation.sums(
            grads, variables, [internals.accumulated_gradients(self)[n] for n in places]
        )

    def _accumulate(self, grads: list[Any], variables: list[Any]) -> None:
        sums = self._sums(grads, variables)
        present = [place for place, grad in enumerate(sums) if grad is not None]
        places = [internals.place_of(self, variables[place]) for place in present]
        kept = [internals.accumulated_gradients(self)[place] for place in places]
        self._branching.assign(kept, [sums[place] for place in present])

    def _update(self, grads: list[Any], variables: list[Any]) -> None:
        """Clip the gradients of an update, and take the step if it is to be taken."""
        built = self._learned
        own = library()
        grads = self._branching.added_up(
            grads, [not accumulation.is_overwritten(v) for v in variables]
        )
        found: dict[str, Array | None] = dict.fromkeys(built.weights)
        names = [built.names[internals.place_of(self, v)] for v in variables]
        for name, grad in zip(names, grads, strict=True):
            if name in found:
                found[name] = prepared(grad, built.clip.shapes[name], name)
        weights = {}
        if "weights" in built.clip.needs:
            weights = built.values()
        passed, after = built.clip.step(
            found, built.state(), weights, zero_skipped=False, library=own
        )
        self._forget_accumulated()
        if self.nonfinite == "raise" and is_known(passed.bad) and bool(passed.bad):
            culprits = built.clip.outcome(after).nonfinite
            raise NonFinite(f"non-finite entries in {', '.join(culprits[:5])}", where=WHERE)
        self._write(after, "")
        pairs = zip(names, grads, strict=True)
        hand = [passed.arrays[name] if name in found else grad for name, grad in pairs]
        hand = accumulation.shares(hand, variables, self._branching.replicas)
        step = lambda arrays: self._step(arrays, variables)  # noqa: E731
        if self._skips:
            self._branching.either(~passed.skip, step, lambda _: None, hand)
        else:
            step(hand)

    def _step(self, grads: list[Any], variables: list[Any]) -> None:
        built = self._learned
        self.inner_optimizer.apply(grads, variables)
        if built.bound is not None:
            arrays, after = built.bound.step(built.values(), built.state(BOUND), library())
            self._branching.assign([built.weights[name] for name in arrays], list(arrays.values()))
            self._write(after, BOUND)

    def _write(self, state: State, prefix: str) -> None:
        self._branching.assign(
            [self._learned.entries[prefix + key] for key in state], list(state.values())
        )

    def _forget_accumulated(self) -> None:
        if self.gradient_accumulation_steps:
            kept = internals.accumulated_gradients(self)
            self._branching.assign(kept, [keras.ops.zeros(v.shape, dtype=v.dtype) for v in kept])

    def _stop_if_due(self) -> None:
        bad = value_of(self._learned.entries["bad_in_a_row"])
        if is_known(bad) and self.nonfinite != "pass":
            self.check()

    def check(self) -> None:
        """Raise `NonFinite`, naming the variables, once `stop_after` steps in a row were not finite.

        Compiled code cannot raise: call this now and then. ``fit`` ends with it.
        """
        in_a_row = 0 if self._own is None else self._own.bad_in_a_row()
        if in_a_row >= self.stop_after:
            culprits = ", ".join(self.last.nonfinite[:5]) if self.last else ""
            raise NonFinite(
                f"{in_a_row} steps in a row with non-finite entries, the last in {culprits}",
                where=WHERE,
            )

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Set the final values of variables, as the optimizer inside does, after `check`."""
        self.check()
        super().finalize_variable_values(var_list)

    def save_own_variables(self, store: Any) -> None:
        """Write the state of the clip; Keras saves the inner optimizer beside it."""
        store[saved_state.ITERATION] = keras.ops.convert_to_numpy(internals.apply_count(self))
        if self._own is not None:
            bound = self._own.bound
            stage = None if bound is None else bound.plan.stage
            saved_state.to_store(store, self._saved(), self._own.names, stage)

    def load_own_variables(self, store: Any) -> None:
        """Read what `save_own_variables` wrote, or warn; entries go with names, else with places."""
        if self._own is None or saved_state.NAMES not in set(store.keys()):
            why, built = "the file holds no clip", self._own is not None
            saved_state.warn_unread(self.name, why, built=built)
            return
        built, saved = self._learned, self._saved()
        found = saved_state.from_store(
            store,
            saved,
            built.names,
            built.clip.plan,
            None if built.bound is None else built.bound.plan.stage,
            where=f"{WHERE} (load)",
        )
        for key, value in found.items():
            saved[key].assign(value)
        internals.apply_count(self).assign(np.asarray(store[saved_state.ITERATION]))

    def _saved(self) -> dict[str, Any]:
        kept = internals.accumulated_gradients(self) if self.gradient_accumulation_steps else []
        pairs = zip(self._learned.names, kept, strict=False)
        return self._learned.entries | {ACCUMULATED + name: variable for name, variable in pairs}

    def get_config(self) -> dict[str, Any]:
        """Return the configuration, as plain data."""
        steps, scale = self.gradient_accumulation_steps, self.loss_scale_factor
        inner = inside.inner_config(self.inner_optimizer, steps=steps, scale=scale)
        names = [] if self._own is None else self._own.names
        return {
            "name": self.name,
            "inner_optimizer": inner,
            "rule": spec.to_dict(self.rule),
            "bound": None if self.bound is None else spec.to_dict(self.bound, "bound"),
            "only": inside.plain(self.only),
            "exclude": inside.plain(self.exclude),
            "nonfinite": self.nonfinite,
            "stop_after": self.stop_after,
            "unit_axes": inside.plain(self.unit_axes),
            "fan_in": inside.plain(self.fan_in),
            "variables": inside.variable_list(names, self.trained) or self._saved_variables,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> ClippedOptimizer:
        """Return the optimizer of a configuration."""
        given = dict(config)
        inner: Any = keras.saving.deserialize_keras_object(
            given.pop("inner_optimizer"), custom_objects=custom_objects
        )
        rule, bound = spec.from_dict(given.pop("rule")), given.pop("bound")
        bound = None if bound is None else spec.from_dict(bound, "bound")
        if bound is not None:
            # Versions without these settings bounded the gains of normalisation layers too.
            given.setdefault("only", "*")
        saved = given.pop("variables", [])
        made = cls(inner, rule, bound=bound, **given)
        made._saved_variables = tuple(saved)
        return made
