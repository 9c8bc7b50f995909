"""Changes of an ONNX graph that the steps of an export are made of."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from karikomi.errors import Unavailable, install_hint

WHERE = "torch.export_onnx"

Node = Any
Value = Any
"""Of onnx_ir, which is imported with the first export."""


def imported(name: str) -> Any:
    """Return a package of the ``onnx`` extra; raises `Unavailable` with how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(
            f"{name} is not installed ({error})", where=WHERE, hint=install_hint("onnx")
        ) from error


class GraphEdits:
    """One graph, with initializers as arrays and new nodes beside the ones that use them."""

    def __init__(self, model: Any) -> None:
        self.model, self.graph, self._ir = model, model.graph, imported("onnx_ir")
        self._shared: dict[tuple[str, str, tuple[int, ...], bytes], Value] = {}
        self._names = {value.name for value in self._values()}

    def nodes(self, *kinds: str) -> list[Node]:
        """Return the nodes of these operators, or all, in order."""
        return [node for node in self.graph if not kinds or node.op_type in kinds]

    def constant(self, value: Value | None) -> np.ndarray | None:
        """Return the array of an initializer, or None for a value that is computed."""
        if value is None or value.const_value is None:
            return None
        return np.asarray(value.const_value.numpy())

    def stored(self, name: str, array: np.ndarray | np.generic) -> Value:
        """Return an initializer of this content; equal ones of the same name stem are stored once."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        key = (name, str(array.dtype), array.shape, array.tobytes())
        if key not in self._shared:
            tensor = self._ir.tensor(array, name=self._fresh(name))
            kind = self._ir.TensorType(tensor.dtype)
            value = self._ir.Value(
                name=tensor.name, shape=self._ir.Shape(array.shape), type=kind, const_value=tensor
            )
            self.graph.register_initializer(value)
            self._shared[key] = value
        return self._shared[key]

    def shape(self, sizes: Sequence[int | None]) -> Any:
        """Return a shape, None for an open axis."""
        return self._ir.Shape(sizes)

    def before(self, node: Node, kind: str, *inputs: Value, name: str, **attributes: Any) -> Value:
        """Insert a node before another one, and return its output."""
        made = self._ir.node(kind, list(inputs), attributes=attributes or None)
        self._named_(made, name)
        self.graph.insert_before(node, made)
        return made.outputs[0]

    def after(self, value: Value, kind: str, *inputs: Value, name: str, **attributes: Any) -> Value:
        """Insert a node that reads a value and others behind what makes the value, and return its output."""
        made = self._ir.node(kind, [value, *inputs], attributes=attributes or None)
        self._named_(made, name)
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, made)
        else:
            self.graph.insert_before(self.graph[0], made)
        return made.outputs[0]

    def uses(self, value: Value) -> list[tuple[Node, int]]:
        """Return the nodes that read a value, each with the place among its inputs."""
        return [(use.node, use.idx) for use in value.uses()]

    def only_reader(self, value: Value) -> Node | None:
        """Return the node that alone reads a value which is no output of the graph."""
        found = self.uses(value)
        return found[0][0] if len(found) == 1 and not value.is_graph_output() else None

    def bypass_(self, node: Node) -> None:
        """Remove a node of one output, whose first input takes its place."""
        self.replace_(node, node.inputs[0])

    def replace_(self, node: Node, value: Value) -> None:
        """Remove a node of one output, whose readers read another value; an output of the graph keeps its name."""
        output = node.outputs[0]
        if output.is_graph_output():
            value.type, value.shape = output.type, output.shape
            output.name, value.name = self._fresh(f"{output.name}_gone"), output.name
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def tidy_(self) -> None:
        """Remove what no output depends on."""
        passes = imported("onnx_ir.passes.common")
        passes.RemoveUnusedNodesPass()(self.model)
        self.graph.sort()

    def _named_(self, node: Node, name: str) -> None:
        node.outputs[0].name = self._fresh(name)
        node.name = f"node_{node.outputs[0].name}"

    def _fresh(self, name: str) -> str:
        found, number = name, 1
        while found in self._names:
            found, number = f"{name}_{number}", number + 1
        self._names.add(found)
        return found

    def _values(self) -> Iterator[Value]:
        yield from self.graph.inputs
        yield from self.graph.initializers.values()
        for node in self.graph.all_nodes():
            yield from node.outputs


def attribute(node: Node, name: str, default: Any = None) -> Any:
    """Return an attribute of a node, or its default."""
    found = node.attributes.get(name)
    return default if found is None else found.value
