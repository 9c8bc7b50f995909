"""A bound as a constraint of Keras: a function of one weight that fit applies after every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from karikomi import spec
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.functional.bounding import (
    MEASURED,
    bound_named,
    check_bound,
    fresh_bound_state,
    plan_bound,
)
from karikomi.functional.unit_axes import resolved_axes, resolved_fan_ins
from karikomi.keras.arrays.library import library
from karikomi.keras.clipping.named_clip import leaves_of
from karikomi.rule import Quantity, Rule, Scope
from karikomi.rules import decide
from karikomi.schedule import whole

WHERE = "keras.Bound"
_IN_THE_OPTIMIZER = "kk.keras.clipped(optimizer, rule, bound=...) keeps what it needs"


@keras.saving.register_keras_serializable(package="karikomi")
class Bound(keras.constraints.Constraint):
    """Keep one weight within a bound, as a constraint of a layer.

    ``weight = bounded(weight)`` after every step of ``fit``, on every backend. The dtype stays, and a weight
    within the bound keeps its bits; one that is not finite is left as it is.

    `rule`: of `karikomi.bound`, one that learns nothing: `Clamp`, `Box`, `MaxNorm`, `UnitNorm`, `MinMaxNorm`,
    `NonNegative`, `L1Ball`, `Simplex`, `HalfSpace`, `InitScaled`. `unit_axis`: for rules per unit, the axis whose
    index is one output unit, or the axes that together name one: -1 for Dense, for convolutions and for recurrent
    kernels, 0 for Embedding. That is *not* the ``axis`` of Keras' own ``MaxNorm``, over which that sums. `fan_in`:
    for `InitScaled`, how many inputs feed one output. `bound_` takes both from the layers of a built model.

    To load a model that holds one, ``import karikomi.keras`` first, since Keras looks up the class by its name.

    Raises `Unsupported` for a limit that is a schedule and for a rule that keeps a state or measures more than one
    weight, since a constraint has no step; `InvalidArgument` for a `unit_axis` or `fan_in` that is missing
    or of no use to the rule; `UnknownName` for a rule that is not registered and could not be saved.

    >>> import keras, karikomi as kk
    >>> layer = keras.layers.Dense(8, kernel_constraint=Bound(kk.bound.MaxNorm(2.0), unit_axis=-1))
    >>> layer.get_config()["kernel_constraint"]["config"]
    {'rule': {'rule': 'MaxNorm', 'limit': 2.0, 'per': 'unit', 'norm': 2.0}, 'unit_axis': -1, 'fan_in': None}

    Deviation from Keras: its ``MaxNorm`` and ``UnitNorm`` multiply at every step by limit / (norm + 1e-7), and
    so drift below the limit.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        unit_axis: int | Sequence[int] | None = None,
        fan_in: int | None = None,
    ) -> None:
        check_constraint(rule, where=WHERE)
        self._plain = spec.to_dict(rule, "bound")
        self.rule = rule
        self.unit_axis = unit_axis if unit_axis is None else _axes(unit_axis)
        self.fan_in = fan_in
        _check_given("unit_axis", unit_axis, rule.scope is Scope.UNIT, rule, "unit_axis=-1")
        _check_given("fan_in", fan_in, "fan_in" in rule.needs, rule, "fan_in=784")
        if fan_in is not None:
            resolved_fan_ins({"weight": fan_in}, {"weight": ()}, where=WHERE)

    def __call__(self, w: Any) -> Any:
        """Return the weight within the bound."""
        weight = tensor_of(w)
        shapes = {"weight": tuple(weight.shape)}
        axes = None if self.unit_axis is None else {"weight": self.unit_axis}
        fans = {} if self.fan_in is None else {"weight": float(self.fan_in)}
        plan = plan_bound(
            self.rule, shapes, resolved_axes(axes, shapes, where=WHERE), fans, where=WHERE
        )
        own = library()
        state = fresh_bound_state(plan, library=own)
        return bound_named(plan, {"weight": weight}, state, library=own).arrays["weight"]

    def get_config(self) -> dict[str, Any]:
        """Return what a file holds of it: plain values, the rule by its name."""
        axis = self.unit_axis
        plain = list(axis) if isinstance(axis, tuple) else axis
        return {"rule": dict(self._plain), "unit_axis": plain, "fan_in": self.fan_in}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Bound:
        """Return the constraint that `get_config` described; nothing is imported by name."""
        rest = {key: value for key, value in config.items() if key != "rule"}
        return cls(spec.from_dict(config.get("rule", {}), "bound"), **rest)

    def __repr__(self) -> str:
        given = {"unit_axis": self.unit_axis, "fan_in": self.fan_in}
        settings = [f"{name}={value}" for name, value in given.items() if value is not None]
        return f"Bound({', '.join([repr(self.rule), *settings])})"


def tensor_of(variable: Any) -> Any:
    """Return the entries of a variable as the backend's tensor, which Keras on TensorFlow does not by itself."""
    known = variable.value if isinstance(variable, keras.Variable) else variable
    return keras.ops.stop_gradient(keras.ops.convert_to_tensor(known))


def check_constraint(rule: Any, *, where: str) -> None:
    """Raise an error unless this is a rule on weights that needs one weight at a time."""
    needs = {need for leaf in leaves_of(rule) for need in leaf.needs} - set(MEASURED)
    if needs and getattr(rule, "of", None) is Quantity.WEIGHT:
        raise Unsupported(
            "a constraint sees one weight and nothing else",
            where=where,
            got=f"{type(rule).__name__}, which needs {', '.join(sorted(needs))}",
        )
    check_bound(rule, where=where)
    if rule.scope is Scope.GLOBAL or getattr(rule, "has_names", False):
        raise Unsupported(
            "a constraint sees one weight, whose name it does not have",
            where=where,
            got=f"{rule!r}, which is of several weights or names them",
            hint=_IN_THE_OPTIMIZER,
        )
    scheduled = _scheduled(rule)
    if scheduled:
        raise Unsupported(
            "a constraint has no step, so a schedule cannot be followed",
            where=where,
            got=f"{type(rule).__name__}({scheduled[0]}=...)",
            hint=_IN_THE_OPTIMIZER,
        )
    state = decide.begin(rule, np.zeros(1), xp=np)  # type: ignore[arg-type]
    kept = sorted(set(state) - set(decide.COUNTERS))
    if kept:
        raise Unsupported(
            "a constraint keeps nothing between steps",
            where=where,
            got=f"{type(rule).__name__}, which keeps {', '.join(kept)}",
            hint=_IN_THE_OPTIMIZER,
        )


def _scheduled(rule: object) -> list[str]:
    fields = dataclasses.fields(rule) if dataclasses.is_dataclass(rule) else ()
    values = {field.name: getattr(rule, field.name, None) for field in fields}
    return [name for name, value in values.items() if callable(getattr(value, "value", None))]


def _axes(given: int | Sequence[int]) -> int | tuple[int, ...]:
    several = tuple(given) if isinstance(given, list | tuple) else (given,)
    numbers = tuple(whole(axis) for axis in several)
    if not numbers or None in numbers:
        raise InvalidArgument(
            "an axis is a whole number",
            where=WHERE,
            got=repr(given),
            allowed="such as -1, (-2, -1)",
        )
    return numbers if isinstance(given, list | tuple) else numbers[0]  # type: ignore[return-value]


def _check_given(name: str, value: object, wanted: bool, rule: Rule, example: str) -> None:
    if wanted and value is None:
        raise InvalidArgument(
            f"{type(rule).__name__} needs {name}",
            where=WHERE,
            hint=f"{example}, or bound_ on a built model, which takes it from the layers",
        )
    if value is not None and not wanted:
        raise InvalidArgument(
            f"{name} is of no use to this rule", where=WHERE, got=type(rule).__name__
        )
