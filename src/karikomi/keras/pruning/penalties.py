"""Penalties for Keras 3: a scalar for a custom loss, and a regularizer of a layer, which ``fit`` adds.

``model.add_loss`` cannot be used: outside of ``call`` it takes a number, which the next call drops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import layers

from karikomi import spec
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.functional.unit_axes import resolved_axes
from karikomi.keras.arrays.library import library
from karikomi.keras.layers.prunable import KERNELS
from karikomi.keras.layers.unit_axes import Weight, weights_of
from karikomi.prune.mask_mapping import check_masks
from karikomi.prune.penalties.penalty import Penalty as Rule
from karikomi.prune.penalties.penalty import check_penalty, term
from karikomi.schedule import Schedule
from karikomi.select import select

WHERE = "keras.penalty"
_IN_THE_LOSS = "add kk.keras.penalty(self, rule, step=...) in the model's compute_loss"


def penalty(
    model: Any,
    rule: Rule,
    *,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    step: Any = None,
    masks: Mapping[str, Any] | None = None,
) -> Any:
    """Return a penalty on the weights of a built model as a scalar of the backend: add it to the loss.

    ``strength(step) * sum of the rule's terms``, accumulated in float32 at least; its derivative at zero
    is zero. Call it where the loss is computed: under a ``tf.GradientTape``, before torch's ``backward``,
    within the ``keras.StatelessScope`` of a JAX loss, or in a model's own ``compute_loss``, which ``fit``
    calls on every backend. Kernels of Dense, EinsumDense and convolutions count, for `ScaleL1` the scales
    of batch normalisations; biases, embeddings, recurrent kernels and frozen weights do not.

    `only`, `exclude`: paths of variables (``net/dense/kernel``) or globs over them. `step`: required for a
    strength that changes: a number, a tensor or a variable, counted from 0. `masks`: for `GrowingL2`, path ->
    true where a weight is kept; those of biases and norms do not count.

    Raises `InvalidArgument` for a rule, masks or a step that do not fit and for a model that is not built,
    `UnknownName` for a glob or a mask that matches nothing, `Unsupported` with the reasons if nothing is penalised.

    >>> import keras, karikomi as kk
    >>> head = keras.layers.Dense(2, kernel_initializer="ones", name="head")
    >>> model = keras.Sequential([keras.Input((4,)), head], name="net")
    >>> term = penalty(model, kk.prune.GroupLasso(0.5))  # 0.5 * 2 units * sqrt(4) * 2
    >>> keras.ops.convert_to_numpy(term).round(6).tolist()
    4.0
    """
    check_penalty(rule, masks, where=WHERE)
    found = weights_of(model, where=WHERE)
    shapes = {item.variable.path: tuple(item.variable.shape) for item in found}
    check_masks(masks, shapes, where=WHERE)
    reasons = {item.variable.path: _why_not(rule, item, masks) for item in found}
    names = select(list(reasons), only=only, exclude=exclude, where=WHERE)
    chosen = [
        item for item in found if item.variable.path in names and not reasons[item.variable.path]
    ]
    if not chosen:
        raise Unsupported(
            "there is nothing to penalise",
            where=f"{WHERE} ({type(rule).__name__})",
            got="; ".join(f"{name}: {reasons[name]}" for name in names[:3]),
        )
    terms = [
        _term(
            rule,
            item.variable,
            item.axes or (),
            None if masks is None else masks[item.variable.path],
        )
        for item in chosen
    ]
    return _strength(rule, step) * sum(terms[1:], start=terms[0])


@keras.saving.register_keras_serializable(package="karikomi")
class Penalty(keras.Regularizer):
    """A penalty on one weight, as a regularizer of a layer: ``fit`` adds it to the loss on every backend.

    The same numbers as `penalty`, for one variable: ``strength * term``.

    `rule`: `L1`, `ScaleL1` (as ``gamma_regularizer``) or `GroupLasso`. `unit_axis`: for `GroupLasso`, the
    axis whose index is one output unit, or the axes that together name one: -1 for Dense and convolutions.

    To load a model that holds one, ``import karikomi.keras`` first, since Keras looks up the class by its name.

    Raises `Unsupported` for a strength that is a schedule and for `GrowingL2`, since a regularizer has no step
    and no mask; `InvalidArgument` for a `unit_axis` that is missing or of no use.

    >>> import keras, karikomi as kk
    >>> layer = keras.layers.Dense(8, kernel_regularizer=Penalty(kk.prune.GroupLasso(1e-3), unit_axis=-1))
    >>> layer.get_config()["kernel_regularizer"]["config"]
    {'rule': {'rule': 'GroupLasso', 'strength': 0.001}, 'unit_axis': -1}
    """

    def __init__(self, rule: Rule, *, unit_axis: int | Sequence[int] | None = None) -> None:
        check_penalty(
            rule, {} if getattr(rule, "of_marked", False) else None, where="keras.Penalty"
        )
        if rule.of_marked or isinstance(rule.strength, Schedule):
            raise Unsupported(
                "a regularizer has no step and no mask",
                where="keras.Penalty",
                got=repr(rule),
                hint=_IN_THE_LOSS,
            )
        if (unit_axis is None) is rule.per_unit:
            raise InvalidArgument(
                "unit_axis is needed" if rule.per_unit else "unit_axis is of no use",
                where=f"keras.Penalty({type(rule).__name__})",
                got=repr(unit_axis),
                allowed="unit_axis=-1" if rule.per_unit else "nothing",
            )
        self._plain = spec.to_dict(rule, "penalty")
        self.rule = rule
        self.unit_axis = list(unit_axis) if isinstance(unit_axis, Sequence) else unit_axis

    def __call__(self, x: Any) -> Any:
        """Return the penalty on one weight, a scalar."""
        given = None if self.unit_axis is None else {"weight": self.unit_axis}
        axes = resolved_axes(given, {"weight": tuple(x.shape)}, where="keras.Penalty")
        return self.rule.strength_at(0) * _term(self.rule, x, axes.get("weight", ()), None)

    def get_config(self) -> dict[str, Any]:
        """Return what a file holds of it: plain values, the rule by its name."""
        return {"rule": dict(self._plain), "unit_axis": self.unit_axis}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Penalty:
        """Return the regularizer that `get_config` described; nothing is imported by name."""
        rest = {key: value for key, value in config.items() if key != "rule"}
        return cls(spec.from_dict(config.get("rule", {}), "penalty"), **rest)


def _why_not(rule: Rule, first: Weight, masks: Mapping[str, Any] | None) -> str:
    is_norm = isinstance(first.layer, layers.BatchNormalization)
    if rule.of == "scales" and not (is_norm and first.variable.name == "gamma"):
        return "not a scale of a batch normalisation"
    if rule.of != "scales" and not (isinstance(first.layer, KERNELS) and first.axes is not None):
        return "not a kernel of a Dense layer or a convolution"
    if not first.variable.trainable:
        return "it is not trained"
    return "it has no mask" if rule.of_marked and first.variable.path not in (masks or {}) else ""


def _term(rule: Rule, weight: Any, axes: tuple[int, ...], kept: Any) -> Any:
    entries: Any = keras.ops.convert_to_tensor(weight)
    double = keras.backend.standardize_dtype(entries.dtype) == "float64"
    return term(
        rule,
        entries if double else keras.ops.cast(entries, "float32"),
        axes,
        None if kept is None else keras.ops.convert_to_tensor(kept),
        xp=library().xp,
        constant=keras.ops.stop_gradient,
    )


def _strength(rule: Rule, step: Any) -> Any:
    if isinstance(step, keras.Variable) or keras.ops.is_tensor(step):
        now = keras.ops.cast(keras.ops.convert_to_tensor(step), "float32")
        return rule.strength_now(now, xp=library().xp)
    return rule.strength_at(step)
