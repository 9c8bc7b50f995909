"""A trained model and its data, as a search takes them: copies, arrays of examples, and what it was compiled with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import keras
import numpy as np

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.keras.internals import graph_of
from karikomi.keras.layers.codes import as_floats
from karikomi.keras.shrinking.rewriting import Copy
from karikomi.tasks.metrics import (
    binary_accuracy,
    categorical_accuracy,
)
from karikomi.tasks.runner import CompiledWith
from karikomi.tasks.splits import Inputs, Split, mapped_inputs

ACCURACIES = {"accuracy", "acc", "sparse_categorical_accuracy", "categorical_accuracy"}
ACCURACIES |= {"binary_accuracy"}
CROSS_ENTROPIES = {"sparse_categorical_crossentropy", "categorical_crossentropy"}
CROSS_ENTROPIES |= {"binary_crossentropy", "categorical_focal_crossentropy"}
SQUARES = {"mse", "mean_squared_error"}
ABSOLUTES = {"mae", "mean_absolute_error"}


class Copies:
    """A function without arguments that returns a copy of a model with the same weights and names."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self) -> Any:
        """Return a copy, which is not compiled."""
        copy = copied(self.model)
        copy.set_weights(self.model.get_weights())
        return copy

    def compile_(self, other: Any) -> None:
        """Compile another model as the given one, with a new optimizer, where it is and its configuration allows it."""
        config = self.model.get_compile_config() if self.model.compiled else None
        if config and not other.compiled:
            # A loss or metric of the user's own that is not registered has no configuration to be made from.
            with suppress(TypeError, ValueError):
                other.compile_from_config(config)


def copies_of(model: Any) -> Copies:
    """Return a function that returns copies of a built model; raises `Unsupported` for one without a configuration."""
    if not model.built:
        raise InvalidArgument(
            "the model has no variables yet",
            where="compress",
            hint="model.build(input_shape) first",
        )
    copied(model)
    return Copies(model)


def copied(model: Any) -> Any:
    """Return a model of the same layers and names, with weights of its own."""
    if graph_of(model) is not None:
        return Copy(model).model
    try:
        other = type(model).from_config(model.get_config())
        other.build_from_config(model.get_build_config() or {})
    except Exception as error:
        raise Unsupported(
            "a subclassed model is copied by its configuration, and this one has none that works",
            where="compress",
            got=f"{type(error).__name__}: {str(error)[:200]}",
            hint="give it get_config, or make a functional model, keras.Model(inputs, outputs)",
        ) from error
    if not other.built:
        raise Unsupported(
            "the copy of a subclassed model is not built", where="compress", hint="give it build()"
        )
    return other


def examples(
    model: Any, data: Any, *, where: str, own_loss: bool = True
) -> tuple[Inputs, np.ndarray | None]:
    """Return one pass over data as arrays: the inputs of a model, and the targets, or None where it has none.

    `data`: what ``fit`` takes: a pair ``(inputs, targets)`` of arrays, a ``tf.data.Dataset``, a ``PyDataset``, a
    generator that ends, a torch loader, a list of batches. Targets of shape (n, 1) that are whole numbers are classes.

    Raises `InvalidArgument` for data without examples, `Unsupported` for weights of examples and for several targets.

    >>> net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> found, targets = examples(net, (np.ones((3, 2)), np.array([[0], [1], [1]])), where="validation")
    >>> found.shape, targets.tolist()
    ((3, 2), [0, 1, 1])
    """
    parts = list(_pairs(data, where))
    if not parts:
        raise InvalidArgument("the data have no batch", where=where)
    labelled = {targets is not None for _, targets in parts}
    if len(labelled) > 1:
        raise InvalidArgument("some batches have targets and some have none", where=where)
    known = labelled == {True}
    split = Split.of(
        (inputs, targets if targets is not None else np.zeros(len(Split(inputs, np.zeros(0))), int))
        for inputs, targets in parts
    )
    inputs = _fitting(model, split.inputs, where)
    return inputs, _targets(model, split.targets) if known else None


def compiled_of(model: Any, outputs: np.ndarray, targets: np.ndarray) -> CompiledWith:
    """Return loss, metric and goal that a model was compiled with, as the search takes them.

    The metric is the first that was compiled, or else the one that fits the loss. Classes on the last axis. Raises
    `InvalidArgument` for a metric that karikomi has no NumPy form of.
    """
    loss = loss_of(model)
    if loss is None:
        return CompiledWith()
    config = model.get_compile_config() or {}
    named = _first_name(config.get("metrics")) or _first_name(config.get("loss"))
    kinds: list[tuple[set[str], Callable[[], tuple[Any, str | None]]]] = [
        (ACCURACIES | CROSS_ENTROPIES, lambda: (_accuracy(outputs, targets), "max")),
        (SQUARES, lambda: ("mean_squared_error", "min")),
        (ABSOLUTES, lambda: ("mean_absolute_error", "min")),
    ]
    for names, kind in kinds:
        if named in names:
            metric, goal = kind()
            return CompiledWith(loss, metric, goal, -1)
    if named is None:
        return CompiledWith(loss)
    raise InvalidArgument(
        "the metric that the model was compiled with has no NumPy form here",
        where="compress",
        got=named,
        allowed='metric="accuracy", "mean_squared_error", or a function of NumPy (outputs, targets) with its goal=',
    )


def loss_of(model: Any) -> Any:
    """Return the loss that a model was compiled with, or None."""
    if not getattr(model, "compiled", False):
        return None
    return keras.losses.get(model.loss) if isinstance(model.loss, str) else model.loss


def _accuracy(outputs: np.ndarray, targets: np.ndarray) -> Any:
    if outputs.shape == targets.shape and outputs.shape[-1] > 1:
        return categorical_accuracy
    if outputs.size == targets.size:
        return binary_accuracy
    return "accuracy"


def _first_name(entry: Any) -> str | None:
    """Return the name of the first metric or loss of a configuration, in lower case with underscores."""
    while isinstance(entry, list | tuple | dict) and entry:
        if isinstance(entry, dict):
            if "class_name" in entry:
                entry = (
                    entry["config"] if entry["class_name"] == "function" else entry["class_name"]
                )
                continue
            entry = list(entry.values())
        entry = next((item for item in entry if item is not None), None)
    if not isinstance(entry, str):
        return None
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", entry).lower()


def _pairs(data: Any, where: str) -> Iterator[tuple[Inputs, np.ndarray | None]]:
    if isinstance(data, tuple) and len(data) in (2, 3) and not _is_batches(data):
        yield _pair(data, where)
        return
    if hasattr(data, "shape") or isinstance(data, Mapping):
        yield _arrays(data, where), None
        return
    known: Any = data
    if isinstance(data, keras.utils.PyDataset):
        known = map(known.__getitem__, range(len(known)))
    for batch in known:
        yield (
            _pair(batch, where)
            if isinstance(batch, tuple | list)
            else (_arrays(batch, where), None)
        )


def _is_batches(data: tuple[Any, ...]) -> bool:
    """Return whether a tuple holds batches that are pairs themselves, rather than inputs and targets."""
    return all(isinstance(item, tuple) and len(item) == 2 for item in data)


def _pair(batch: Any, where: str) -> tuple[Inputs, np.ndarray | None]:
    inputs, *rest = batch
    if len(rest) > 1 and rest[1] is not None:
        raise Unsupported(
            "weights of examples do not count in the metric",
            where=where,
            hint="give pairs (inputs, targets), and a metric= that weighs them if it must",
        )
    targets = rest[0] if rest else None
    if isinstance(targets, Mapping | list | tuple):
        raise Unsupported(
            "there are several targets, and one metric",
            where=where,
            hint="a model with the output that counts: keras.Model(model.inputs, model.outputs[0])",
        )
    return _arrays(inputs, where), None if targets is None else _array(targets, where)


def _arrays(inputs: Any, where: str) -> Inputs:
    several = tuple(inputs) if isinstance(inputs, list) else inputs
    return mapped_inputs(several, lambda value: _array(value, where))


def _array(value: Any, where: str) -> np.ndarray:
    if isinstance(value, np.ndarray | np.generic | float | int):
        return np.asarray(value)
    try:
        return as_floats(np.asarray(keras.ops.convert_to_numpy(value)))
    except Exception as error:
        raise Unsupported(
            "this is no array", where=where, got=f"{type(value).__name__}: {error}"
        ) from error


def _fitting(model: Any, inputs: Inputs, where: str) -> Inputs:
    """Return inputs of one array alone without their mapping or tuple; raise for another number of inputs."""
    graph = graph_of(model)
    if graph is None:
        return inputs
    count = 1 if isinstance(inputs, np.ndarray) else len(inputs)
    if count != len(graph.inputs):
        raise InvalidArgument(
            "the model has another number of inputs",
            where=where,
            got=count,
            allowed=len(graph.inputs),
        )
    return inputs


def _targets(model: Any, targets: np.ndarray) -> np.ndarray:
    """Return whole numbers of shape (n, 1) as (n,), the form of classes, and floats (n,) as (n, 1) of such outputs.

    Keras' losses take either form; an error that is summed over outputs and targets does not.
    """
    if targets.dtype.kind in "iub":
        return targets[:, 0] if targets.shape[1:] == (1,) else targets
    graph = graph_of(model)
    single = graph is not None and [tuple(item.shape[1:]) for item in graph.outputs] == [(1,)]
    return targets[:, None] if single and targets.ndim == 1 else targets
