"""Checks of the optimizer that is wrapped, and names, axes and fan-ins in configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import keras

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.keras.arrays.variables import names_of
from karikomi.keras.internals import learning_rate_of
from karikomi.keras.layers.unit_axes import fan_ins, unit_axes
from karikomi.keras.optimizers.accumulation import PerUpdate

WHERE = "keras.clipped"
_TAKEN = "_is_clipped_by_karikomi"


def checked_optimizer(given: Any, wrapper: type) -> Any:
    """Return an optimizer that can be clipped, or raise an error; `wrapper`: the class of those that are clipped."""
    inner, reason = None, None
    try:
        inner: Any = keras.optimizers.get(given)
    except (TypeError, ValueError) as error:
        reason = error
    if inner is None:
        raise InvalidArgument(
            "this is not an optimizer of Keras",
            where=WHERE,
            got=repr(given),
            allowed="such as keras.optimizers.Adam(1e-3)",
        ) from reason
    if isinstance(inner, wrapper):
        raise Unsupported(
            "this optimizer is clipped already",
            where=WHERE,
            hint="put rules together: kk.clip.Chain(one, other)",
        )
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise Unsupported(
            "the gradients of this optimizer are still scaled",
            where=WHERE,
            hint="LossScaleOptimizer(kk.keras.clipped(inner, rule))",
        )
    check_parts(inner, wrapper)
    if inner.built and inner.gradient_accumulation_steps:
        raise Unsupported(
            "the optimizer has accumulated gradients before",
            where=WHERE,
            hint=f"wrap a new {type(inner).__name__}",
        )
    if getattr(inner, _TAKEN, False):
        raise Unsupported(
            "another clipped optimizer has taken over from this one",
            where=WHERE,
            hint=f"wrap a new {type(inner).__name__}",
        )
    return inner


def check_parts(inner: Any, wrapper: type) -> None:
    """Raise `Unsupported` where an optimizer, or one inside of a `MultiOptimizer`, would clip or accumulate.

    A `MultiOptimizer` that chooses by a function has no optimizers until it is built.
    """
    parts = list(getattr(inner, "optimizers", ()))
    for part in (inner, *parts):
        for argument in ("clipnorm", "global_clipnorm", "clipvalue"):
            if getattr(part, argument, None) is not None:
                raise Unsupported(
                    f"the optimizer would clip as well, its {argument} is set",
                    where=WHERE,
                    got=f"{argument}={getattr(part, argument)}",
                    hint=f"leave {argument} out of {type(part).__name__}(...)",
                )
    for part in parts:
        if isinstance(part, wrapper) or part.gradient_accumulation_steps:
            raise Unsupported(
                "an optimizer inside of this one clips or accumulates gradients itself",
                where=WHERE,
                got=type(part).__name__,
                hint="either clip this one, or each of those inside",
            )


def taken_over(inner: Any) -> tuple[float | None, int | None]:
    """Return the loss scale and the accumulation of an optimizer, which it then leaves to who wraps it."""
    found = inner.loss_scale_factor, inner.gradient_accumulation_steps
    inner.loss_scale_factor = inner.gradient_accumulation_steps = None
    setattr(inner, _TAKEN, True)
    return found


def is_schedule(learning_rate: Any) -> bool:
    """Return whether a learning rate is a schedule."""
    return isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule)


def inner_config(inner: Any, *, steps: int | None, scale: float | None) -> Any:
    """Return the configuration of an optimizer, with the settings that were taken over from it."""
    config: Any = keras.saving.serialize_keras_object(inner)
    taken = {"gradient_accumulation_steps": steps, "loss_scale_factor": scale}
    # A `MultiOptimizer` does not accumulate, and takes no such argument.
    config["config"] |= {key: value for key, value in taken.items() if key in config["config"]}
    rate = learning_rate_of(inner)
    if isinstance(rate, PerUpdate):
        config["config"]["learning_rate"] = keras.optimizers.schedules.serialize(rate.schedule)
    return config


def of_model(axes: Any, inputs: Any) -> tuple[Any, Any]:
    """Return unit axes and fan-ins; where a model was given, those of its trained variables, by their places."""
    if not isinstance(axes, keras.Layer):
        return axes, inputs
    model: Any = axes
    paths = [variable.path for variable in model.trainable_variables]
    known, counted = unit_axes(model)[0], fan_ins(model)[0]
    own = [list(known[path]) if path in known else None for path in paths]
    return own, [counted.get(path) for path in paths] if inputs is None else inputs


def by_name(given: Any, names: Sequence[str], known: Mapping[str, object], *, argument: str) -> Any:
    """Return values by place as values by name; a path contains the name of the model, which may change."""
    if not isinstance(given, list):
        return given
    if len(given) != len(names):
        raise InvalidArgument(
            "these are not the variables of that model",
            where=f"{WHERE} ({argument})",
            got=f"{len(names)} variables",
            allowed=len(given),
        )
    pairs = zip(names, given, strict=True)
    return {name: pair for name, pair in pairs if pair is not None and name in known}


def variable_list(names: Sequence[str], variables: Sequence[Any]) -> list[Any]:
    """Return names and shapes of the variables of an optimizer, for its configuration."""
    pairs = zip(names, variables, strict=True)
    return [[name, list(map(int, variable.shape))] for name, variable in pairs]


def names_as_saved(variables: Sequence[Any], before: Sequence[Any]) -> list[str]:
    """Return the names of variables, those of a saved `variable_list` if it fits them.

    Keras loads a model under other paths than it had, and settings by name have to remain valid.
    """
    names = names_of(variables)
    known = [(str(name), list(shape)) for name, shape in before]
    kinds = [[(_leaf(n), s) for n, s in each] for each in (known, variable_list(names, variables))]
    return [name for name, _ in known] if kinds[0] == kinds[1] else names


def _leaf(name: str) -> str:
    return name.rpartition("/")[2].partition("#")[0]


def plain(given: Any) -> Any:
    """Return a container without the wrappers by which Keras tracks it."""
    if isinstance(given, Mapping):
        return {name: plain(item) for name, item in given.items()}
    return [plain(item) for item in given] if isinstance(given, list | tuple | Set) else given
