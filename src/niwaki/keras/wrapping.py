"""What may be wrapped by a clipped optimizer, what is told to it of variables, and how that is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from niwaki.errors import InvalidArgument, Refused
from niwaki.keras.layers import fan_ins, unit_axes
from niwaki.keras.per_update import PerUpdate

WHERE = "keras.clipped"


def inner_optimizer(given: Any, wrapper: type) -> Any:
    """Return an optimizer that can be clipped, or refuse it; `wrapper`: the class of those that are clipped."""
    try:
        inner: Any = keras.optimizers.get(given)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            "this is no optimizer of Keras",
            where=WHERE,
            got=repr(given),
            allowed="such as keras.optimizers.Adam(1e-3)",
        ) from error
    if isinstance(inner, wrapper):
        raise Refused(
            "this optimizer is clipped already",
            where=WHERE,
            hint="put rules together: nw.clip.Chain(one, other)",
        )
    if isinstance(inner, keras.optimizers.LossScaleOptimizer):
        raise Refused(
            "the gradients of this optimizer are still scaled",
            where=WHERE,
            hint="LossScaleOptimizer(nw.keras.clipped(inner, rule))",
        )
    for argument in ("clipnorm", "global_clipnorm", "clipvalue"):
        if getattr(inner, argument, None) is not None:
            raise Refused(
                f"the optimizer would clip as well, its {argument} is set",
                where=WHERE,
                got=f"{argument}={getattr(inner, argument)}",
                hint=f"leave {argument} out of {type(inner).__name__}(...)",
            )
    if inner.built and inner.gradient_accumulation_steps:
        raise Refused(
            "the optimizer has accumulated gradients before",
            where=WHERE,
            hint=f"wrap a new {type(inner).__name__}",
        )
    return inner


def is_schedule(learning_rate: Any) -> bool:
    """Return whether a learning rate goes by the step."""
    return isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule)


def inner_config(inner: Any, *, steps: int | None, scale: float | None) -> Any:
    """Return the configuration of an optimizer as it was given, with what was taken over from it."""
    told: Any = keras.saving.serialize_keras_object(inner)
    told["config"] |= {"gradient_accumulation_steps": steps, "loss_scale_factor": scale}
    rate = inner._learning_rate
    if isinstance(rate, PerUpdate):
        told["config"]["learning_rate"] = keras.optimizers.schedules.serialize(rate.schedule)
    return told


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
    """Return what was said by place by name: a path changes with the name of the model that it is in."""
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
    return {name: one for name, one in pairs if one is not None and name in known}


def plain(given: Any) -> Any:
    """Return what Keras wrapped to track it, as it was."""
    if isinstance(given, Mapping):
        return {name: plain(one) for name, one in given.items()}
    return [plain(one) for one in given] if isinstance(given, list | tuple) else given
