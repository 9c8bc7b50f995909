"""Set constraints where Keras reads them: ``fit`` at the variable, saved files at the layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

from karikomi.errors import Unsupported
from karikomi.keras.bounding.constraint import Bound
from karikomi.keras.internals import all_layers
from karikomi.keras.layers.unit_axes import Weight

_NAME = "karikomi>Bound"


def attach_(weight: Weight, bound: Bound) -> None:
    """Make a bound the constraint of a variable, and of its layer if that has a setting for it."""
    weight.variable.constraint = bound
    setting = _setting(weight)
    if setting:
        setattr(weight.layer, setting, bound)


def check_free(first: Weight, bound: Bound, *, where: str) -> None:
    """Raise `Unsupported` for a variable that has another constraint, in either place."""
    setting = _setting(first)
    held = [first.variable.constraint, getattr(first.layer, setting) if setting else None]
    for other in held:
        same = isinstance(other, Bound) and other.get_config() == bound.get_config()
        if other is not None and not same:
            raise Unsupported(
                "the weight has another constraint already",
                where=f"{where}: {first.variable.path}",
                got=repr(other) if isinstance(other, Bound) else type(other).__name__,
                hint="exclude it, or build the layer without that constraint",
            )


def unsaved(model: Any, targets: Sequence[Weight]) -> list[str]:
    """Return the paths of the variables whose bound is not saved with the model."""
    saved = set(_saved(_config(model)))
    # The settings of a recurrent layer are those of its cell, but it saves them as its own.
    around = {
        id(layer.cell): layer.name
        for layer in all_layers(model)
        if isinstance(getattr(layer, "cell", None), keras.Layer)
    }
    return [
        target.variable.path
        for target in targets
        if not {
            (target.layer.name, _setting(target)),
            (around.get(id(target.layer)), _setting(target)),
        }
        & saved
    ]


def _setting(weight: Weight) -> str | None:
    """Return the attribute of the layer that holds the constraint of this variable, if it has one."""
    leaf = weight.variable.name
    stems = (leaf, leaf.removesuffix("_kernel"), *(["depthwise"] if leaf == "kernel" else []))
    names = (f"{stem}_constraint" for stem in stems)
    return next((name for name in names if hasattr(weight.layer, name)), None)


def _config(model: Any) -> Mapping[str, Any]:
    try:
        return model.get_config()
    except NotImplementedError:
        return {}


def _saved(config: Any) -> Iterator[tuple[str, str]]:
    """Yield the name of the layer and the setting of every bound in a config."""
    if isinstance(config, list | tuple):
        for value in config:
            yield from _saved(value)
    elif isinstance(config, Mapping):
        for key, value in config.items():
            if isinstance(value, Mapping) and value.get("registered_name") == _NAME:
                yield str(config.get("name")), str(key)
            else:
                yield from _saved(value)
