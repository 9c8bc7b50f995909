"""Run the graph of a functional model on labels: one rule per type of layer or operation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from karikomi.keras.internals import graph_of, nodes_of
from karikomi.shrink.account import OUTPUT
from karikomi.shrink.label_planes import Labelled, Shape, along, varying
from karikomi.shrink.labels import Classes
from karikomi.shrink.meetings import Meetings

Value = Labelled | list[Any]
"""The labels of what a call returns: of a tensor, or a list for several tensors."""

NO_RULE = "there is no rule for this layer or operation"
COMPUTED = "its weights are computed from others (quantized, or with LoRA)"


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One use of a layer or an operation: its arguments, with labels for tensors, and the shapes of what it returns.

    An unknown size, such as that of the batch, counts as 1. `site`: how reports name it. `known`: from which axis on
    all sizes of its first argument and of its first result are known.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: tuple[Shape, ...]
    site: str
    known: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> Shape:
        """The shape of the first tensor that is returned."""
        return self.shapes[0]

    @property
    def values(self) -> list[Labelled]:
        """All tensors among the arguments, masks apart."""
        leaves = keras.tree.flatten((self.args, without_masks(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Labelled)]

    def argument(self, place: int, name: str) -> Any:
        """Return an argument by its place or its name, or nothing."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name)


def without_masks(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the named arguments of a call that are no masks, which Keras passes by name."""
    return {name: value for name, value in kwargs.items() if not name.endswith("mask")}


Rule = Callable[["LabelRun", Call], Value]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these types: ``layers.Dense``, ``ops.Add``."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def kind_of(operation: Any) -> str:
    """Return the name of a type of Keras' own for rules, "" for any other, as a subclass may compute something else.

    >>> kind_of(keras.layers.Dense(2))
    'layers.Dense'
    """
    kind = type(operation)
    if kind.__module__.partition(".")[0] != "keras":
        return ""
    return f"{'layers' if isinstance(operation, keras.Layer) else 'ops'}.{kind.__name__}"


@dataclass(frozen=True, slots=True)
class Propagated:
    """Labels of a model.

    `calls`: each use of a layer or operation with the labels of what it returns. `variables`: id -> labels.
    `classes`: what goes together. `statistics`: id of an operation that computes a statistic (or a softmax) over
    entries of which some can go -> its name. `unknown`: name -> why what reaches it stays.
    """

    calls: tuple[tuple[Call, Value], ...]
    variables: dict[int, Labelled]
    classes: Classes
    statistics: dict[int, str]
    unknown: dict[str, str]


class LabelRun(Meetings):
    """One propagation through a model; if `exact`, no statistic of it may change."""

    def __init__(
        self, model: Any, names: dict[int, str], *, whole: bool = False, exact: bool = False
    ) -> None:
        super().__init__(whole=whole)
        self.model = model
        self.exact = exact
        self._names = names
        self._variables: dict[int, Labelled] = {}
        self._calls: list[tuple[Call, Value]] = []
        self._statistics: dict[int, tuple[str, list[np.ndarray]]] = {}
        self._unknown: dict[str, str] = {}

    def run(self) -> Propagated:
        """Propagate through all layers."""
        graph = graph_of(self.model)
        found = self._through(graph, [bare(tensor) for tensor in graph.inputs])
        for value in found:
            self.fix(value, OUTPUT)
        several = [(value, "its own axes") for value in self._variables.values()]
        for call, found in self._calls:
            several += [(v, call.site) for v in (found if isinstance(found, list) else [found])]
        self.make_products(several)
        classes = self.labels.classes()
        free = classes.free()
        statistics = {
            key: site
            for key, (site, planes) in self._statistics.items()
            if any(free[plane].any() for plane in planes)
        }
        return Propagated(tuple(self._calls), self._variables, classes, statistics, self._unknown)

    def variable(self, variable: Any) -> Labelled:
        """Return the labels of a variable: new ones along each of its axes when it is first met."""
        key = id(variable)
        if key not in self._variables:
            shape = tuple(map(int, variable.shape))
            planes = tuple(
                along(self.labels.new(self._names[key], axis, size), len(shape), axis)
                for axis, size in enumerate(shape)
                if size > 1
            )
            self._variables[key] = Labelled(shape, planes)
        return self.current(self._variables[key], self._names[key])

    def vector(self, value: Labelled, axis: int, site: str) -> Labelled:
        """Return the labels along one axis; those of all others stay."""
        rank = len(value.shape)
        others = [other for other in range(rank) if other != axis % rank]
        left = self.fix(self.current(value, site), site, others)
        return Labelled(
            (value.shape[axis % rank],), tuple(plane.reshape(-1) for plane in left.planes)
        )

    def over_statistics(self, call: Call, value: Labelled, axes: Collection[int]) -> Labelled:
        """Return the value of an operation that measures something over `axes`.

        It is noted if entries along these can go; where outputs have to stay the same, none of them can.
        """
        rank = len(value.shape)
        inside = {axis % rank for axis in axes}
        value = self.current(value, call.site)
        planes = [plane for plane in value.planes if inside & set(varying(plane))]
        if not planes:
            return value
        if self.exact:
            return self.fix(value, f"{call.site} measures over it", inside)
        self._statistics.setdefault(id(call.operation), (call.site, []))[1].extend(planes)
        return value

    def follow(self, call: Call) -> Value:
        """Return the labels of a call by the rule of its type."""
        operation = call.operation
        graph = graph_of(operation)
        if graph is not None:
            return self._inside(graph, call)
        if computes_weights(operation):
            return self.refuse(call, COMPUTED)
        own = RULES.get(kind_of(operation))
        found = self.refuse(call) if own is None else own(self, call)
        self._calls.append((call, found))
        return found

    def refuse(self, call: Call, reason: str = NO_RULE) -> Value:
        """Fix all that reaches a call that no rule covers."""
        reached = [value for value in call.values if value.planes]
        for value in reached:
            self.fix(value, f"{reason}: {call.site}")
        if reached or getattr(call.operation, "weights", None):
            self._unknown[call.site] = reason
        found: list[Any] = [Labelled(shape) for shape in call.shapes]
        return found if len(found) > 1 else found[0]

    def _inside(self, graph: Any, call: Call) -> Value:
        """Run a model that is used as a layer."""
        given = call.values
        if len(given) != len(graph.inputs):
            return self.refuse(call, "some of its inputs are not given")
        inputs = []
        for value, tensor in zip(given, graph.inputs, strict=True):
            shape = bare(tensor).shape
            if len(shape) != len(value.shape):
                return self.refuse(call, "its input has another number of axes")
            unknown = [axis for axis, size in enumerate(tensor.shape) if size is None]
            inputs.append(
                Labelled(shape, self.fix(self.current(value, call.site), call.site, unknown).planes)
            )
        made = self._through(graph, inputs)
        found: list[Any] = [
            Labelled(shape, value.planes) for shape, value in zip(call.shapes, made, strict=True)
        ]
        self._calls.append((call, found))
        return found if len(found) > 1 else found[0]

    def _through(self, graph: Any, inputs: Sequence[Labelled]) -> list[Labelled]:
        known: dict[int, Labelled] = {
            id(tensor): value for tensor, value in zip(graph.inputs, inputs, strict=True)
        }
        for node in nodes_of(graph):
            args, kwargs = node.arguments.fill_in(known)
            shapes = tuple(bare(tensor).shape for tensor in node.outputs)
            operation = node.operation
            site = f"{operation.name} ({type(operation).__name__})"
            known_from = (_known_from(node.input_tensors[0]), _known_from(node.outputs[0]))
            found = self.follow(Call(operation, args, kwargs, shapes, site, known_from))
            parts = found if isinstance(found, list) else [found]
            known |= {id(tensor): part for tensor, part in zip(node.outputs, parts, strict=True)}
        return [known[id(tensor)] for tensor in graph.outputs]


def bare(tensor: Any) -> Labelled:
    """Return a symbolic tensor without labels, unknown sizes as 1."""
    return Labelled(tuple(1 if size is None else int(size) for size in tensor.shape))


def _known_from(tensor: Any) -> int:
    """Return the first axis from which on all sizes are known."""
    return max((axis + 1 for axis, size in enumerate(tensor.shape) if size is None), default=0)


def computes_weights(layer: Any) -> bool:
    """Return whether a layer computes its weights from others."""
    quantized = getattr(layer, "quantization_mode", None) is not None
    return bool(quantized or getattr(layer, "lora_enabled", False))


def placed(vector: Labelled, shape: Shape, axis: int) -> Labelled:
    """Return a tensor of this shape with the labels of a vector along an axis."""
    return Labelled(
        shape,
        tuple(along(plane.reshape(-1), len(shape), axis % len(shape)) for plane in vector.planes),
    )
