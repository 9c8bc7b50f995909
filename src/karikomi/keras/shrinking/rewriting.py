"""Build a smaller model: the same layers with changed configurations, and what stays of their weights."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from karikomi.errors import Unsupported
from karikomi.keras.arrays.variables import on_host
from karikomi.keras.internals import all_layers, graph_of, trusted_functions
from karikomi.keras.labelling.kept import WHERE, KeptWeights
from karikomi.keras.labelling.label_run import Propagated
from karikomi.keras.shrinking.configs import Changes, changes


class Copy:
    """A model of the same layers as another; `layers`: id of a layer or an operation -> the new one."""

    def __init__(self, model: Any, changes: Changes | None = None) -> None:
        self.changes = changes
        self.layers: dict[int, Any] = {}
        self._origin: dict[int, int] = {}
        try:
            self.model = self._cloned(model, None)
        except (ValueError, TypeError) as error:
            raise Unsupported(
                "the layers do not fit together any more",
                where=WHERE,
                got=str(error)[:300],
                hint="please report the model: a rule of a layer is wrong",
            ) from error
        for before, after in zip(all_layers(model), all_layers(self.model), strict=True):
            if before.trainable != after.trainable:
                after.trainable = before.trainable

    def _cloned(self, model: Any, inputs: list[Any] | None) -> Any:
        if isinstance(model, keras.Sequential):
            first = inputs or [
                keras.Input(batch_shape=t.shape, dtype=t.dtype, name=t.name)
                for t in graph_of(model).inputs
            ]
            return keras.Sequential([*first, *map(self._made, model.layers)], name=model.name)
        packed = None if inputs is None else keras.tree.pack_sequence_as(model.input, inputs)
        return keras.models.clone_model(model, packed, self._made, self._called)

    def _made(self, operation: Any) -> Any:
        """Return the new layer or operation for one of the original."""
        if id(operation) not in self.layers:
            graph = graph_of(operation)
            found = self._inner(operation, graph) if graph is not None else self._single(operation)
            self.layers[id(operation)], self._origin[id(found)] = found, id(operation)
        return self.layers[id(operation)]

    def _inner(self, model: Any, graph: Any) -> Any:
        known = {} if self.changes is None else self.changes.inputs
        shapes = known.get(id(model), [tensor.shape for tensor in graph.inputs])
        inputs = [
            keras.Input(batch_shape=shape, dtype=tensor.dtype, name=tensor.name)
            for tensor, shape in zip(graph.inputs, shapes, strict=True)
        ]
        return self._cloned(model, inputs)

    def _single(self, operation: Any) -> Any:
        changed = {} if self.changes is None else self.changes.configs.get(id(operation), {})
        try:
            with (
                trusted_functions(),
                keras.saving.custom_object_scope(own_objects(operation)),
                warnings.catch_warnings(),
            ):
                # That a lambda is not safe in a file is said when the model is saved.
                warnings.filterwarnings("ignore", ".*includes a `lambda`", UserWarning)
                config = _unbuilt({**operation.get_config(), **changed})
                if inspect.isfunction(vars(operation).get("activation")):
                    # Keras does not make an activation of a lambda's code.
                    config["activation"] = operation.activation
                return type(operation).from_config(config)
        except Exception as error:
            raise Unsupported(
                "the layer cannot be made from its configuration",
                where=f"{WHERE}: {operation.name}",
                got=str(error)[:200],
                hint="get_config and from_config of the layer must describe it",
            ) from error

    def _called(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        known = {} if self.changes is None else self.changes.arguments
        changed = known.get(self._origin.get(id(operation), 0))
        return operation(*args, **kwargs) if changed is None else operation(args[0], *changed)


def own_objects(operation: Any) -> dict[str, Any]:
    """Return functions and classes by name that Keras would not find, as they were never registered."""
    functions = [value for value in vars(operation).values() if inspect.isfunction(value)]
    classes = (
        [type(layer) for layer in all_layers(operation)]
        if isinstance(operation, keras.Layer)
        else []
    )
    return {
        found.__name__: found
        for found in (*functions, *classes)
        if not found.__module__.startswith("keras.")
    }


def _unbuilt(config: Any) -> Any:
    """Return a configuration without the shapes that layers inside of it were built for."""
    if isinstance(config, Mapping):
        return {key: _unbuilt(value) for key, value in config.items() if key != "build_config"}
    return type(config)(map(_unbuilt, config)) if type(config) in (list, tuple) else config


def fill_(small: Any, model: Any, numbers: Callable[[Any], np.ndarray]) -> None:
    """Set the weights of a rebuilt model to `numbers` of those of the original."""
    for old, new in zip(model.weights, small.weights, strict=True):
        values = numbers(old)
        if tuple(values.shape) != tuple(new.shape):
            raise Unsupported(
                "the smaller layer has other shapes than what stays of its weights",
                where=f"{WHERE}: {old.path}",
                got=tuple(new.shape),
                allowed=tuple(values.shape),
                hint="please report the layer",
            )
        new.assign(values)
    for layer in all_layers(small):
        if isinstance(layer, keras.layers.Normalization):
            # It computes with numbers that it makes of its weights.
            layer.finalize_state()


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A smaller model.

    `layers`: id of a layer or an operation of the original -> the one there. `changes`: what was changed.
    """

    model: Any
    layers: dict[int, Any]
    changes: Changes

    def fill_(self, original: Any, numbers: Callable[[Any], np.ndarray] = on_host) -> None:
        """Set the weights to what stays of `numbers` of the original's."""

        def cut(variable: Any) -> np.ndarray:
            left = self.changes.kept.cut(variable, numbers(variable))
            scale = self.changes.scales.get(id(variable))
            return left if scale is None else (left * scale).astype(left.dtype)

        fill_(self.model, original, cut)


def rewritten(model: Any, found: Propagated, kept: np.ndarray) -> Rebuilt:
    """Return a smaller copy of a model.

    Raises `Unsupported` naming the layer whose kept entries are no product of indices, or that cannot be made.
    """
    stays = KeptWeights(kept, found)
    stays.check_products()
    new = changes(stays)
    small = Copy(model, new)
    done = Rebuilt(small.model, small.layers, new)
    done.fill_(model)
    return done
