"""Which values of an ONNX graph are integers, and the pairs of nodes that make them so.

Engines run a node in integers where ``DequantizeLinear`` makes its inputs and ``QuantizeLinear`` takes its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from karikomi.quantize.activation_ranges import ActivationGrid
from karikomi.torch.onnx_export.coded_weights import StoredCodes, decoded
from karikomi.torch.onnx_export.graph_edits import GraphEdits, Node, Value, attribute
from karikomi.torch.onnx_export.kernel_fitting import pad_channels_, shortcut_as_kernel_
from karikomi.torch.onnx_export.weighted_nodes import WeightedNode, with_bias_codes

MOVEMENT = frozenset(
    "Reshape Flatten Transpose Slice Squeeze Unsqueeze Identity MaxPool Pad".split()
)
"""Operators whose integer outputs are integer inputs, moved: they need no rounding of their own."""
POINTWISE = frozenset("Add GlobalAveragePool AveragePool Concat".split())
"""Operators with integer kernels that run in integers where all their inputs are integers anyway."""


class IntegerRegions:
    """The values to quantize, found on the float graph, and the rewriting of the graph by their grids.

    A value is `native` if nothing reads it as floats: the outputs of integer kernels. Others, such as the inputs of
    the network or of a softmax, keep their float readers.
    """

    def __init__(self, edits: GraphEdits, layers: Iterable[WeightedNode]) -> None:
        self.edits = edits
        self.layers = {id(item.node): item for item in layers if item.why_float is None}
        self.native: dict[int, Value] = {}
        self._moved: set[int] = set()
        self._pointwise: set[int] = set()
        self._sources: dict[int, Value] = {}
        for node in edits.nodes():
            self._visit_(node)

    @property
    def values(self) -> list[Value]:
        """The values whose ranges have to be known, in the order of the graph."""
        return list(self._sources.values())

    def _visit_(self, node: Node) -> None:
        if id(node) in self.layers:
            source = node.inputs[0]
            if id(source) not in self._moved:
                self._sources.setdefault(id(source), source)
            if self.layers[id(node)].output_is_integer or self._feeds_integers(node):
                self._native_(node)
        elif node.op_type in POINTWISE and self._joins_integers(node):
            self._pointwise.add(id(node))
            self._native_(node)
        elif node.op_type in MOVEMENT and self._is_integer(node.inputs[0]) and self._movable(node):
            self._moved.add(id(node.outputs[0]))

    def _native_(self, node: Node) -> None:
        value = self._tail(node)
        self.native[id(value)] = value
        self._sources.setdefault(id(value), value)

    def _tail(self, node: Node) -> Value:
        """Return the value after an activation that saturation at the ends of the grid replaces."""
        reader = self.edits.only_reader(node.outputs[0])
        return (
            node.outputs[0] if reader is None or not self._saturates(reader) else reader.outputs[0]
        )

    def _saturates(self, node: Node) -> bool:
        if node.op_type == "Relu":
            return True
        least = self.edits.constant(node.inputs[1]) if len(node.inputs) > 1 else None
        return node.op_type == "Clip" and least is not None and float(least) == 0

    def _is_integer(self, value: Value | None) -> bool:
        return value is not None and (id(value) in self.native or id(value) in self._moved)

    def _joins_integers(self, node: Node) -> bool:
        return all(self._is_integer(value) for value in node.inputs) and len(node.outputs) == 1

    def _feeds_integers(self, node: Node) -> bool:
        """Return whether only integer layers read what a layer computes."""
        readers = self.edits.uses(self._tail(node))
        return bool(readers) and all(
            id(reader) in self.layers and place == 0 for reader, place in readers
        )

    def _movable(self, node: Node) -> bool:
        if node.op_type == "MaxPool":
            return len(node.outputs) == 1 or not node.outputs[1].uses()
        if node.op_type != "Pad":
            return True
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        array = self.edits.constant(fill)
        zero = fill is None or (array is not None and not np.any(array))
        return zero and attribute(node, "mode", "constant") == "constant"

    def apply_(self, grids: Mapping[str, ActivationGrid]) -> None:
        """Insert the nodes; a layer whose bias does not fit becomes float: see `WeightedNode.why_float`."""
        named = {value.name: grids[value.name] for value in self.values}
        inputs = {
            id(node): self._grid_of(item.node.inputs[0], named) for node, item in self._items()
        }
        values = [(value, named[value.name]) for value in self.values]
        pads = [
            (node, self._grid_of(node.outputs[0], named))
            for node in self.edits.nodes("Pad")
            if id(node.outputs[0]) in self._moved
        ]
        for value, grid in values:
            self._quantize_(value, grid)
        for node, grid in pads:
            shortcut_as_kernel_(self.edits, node, *self._scales(grid))
        for node, item in self._items():
            self._weights_(item, inputs[id(node)])

    def _items(self) -> list[tuple[Node, WeightedNode]]:
        return [(item.node, item) for item in self.layers.values()]

    def _grid_of(self, value: Value, grids: Mapping[str, ActivationGrid]) -> ActivationGrid:
        """Return the grid of a value, which is that of the value that it was moved from."""
        while id(value) in self._moved:
            value = value.producer().inputs[0]
        return grids[value.name]

    def _weights_(self, item: WeightedNode, grid: ActivationGrid) -> None:
        node, stored = item.node, item.stored
        assert stored is not None  # noqa: S101  (a layer without codes is not in `layers`)
        bias = self.edits.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        step = float(np.float32(grid.scale))
        stored, codes, units = with_bias_codes(stored, item.unit_axis, bias, step)
        if codes is None:
            # The product stays in float, between nodes that round: correct, and slower.
            item.why_float = "its bias does not fit in 32 bits at the scale of its weight"
        elif bias is not None:
            self._bias_(node, stored, codes, units)
        if item.kind == "Conv" and id(node.inputs[0]) not in self._moved:
            zero = self._scales(grid)[1]
            stored = replace(stored, codes=pad_channels_(self.edits, node, stored.codes, zero))
        node.replace_input_with(1, decoded(self.edits, node, stored))

    def _bias_(self, node: Node, stored: StoredCodes, codes: np.ndarray, units: np.ndarray) -> None:
        name = f"{stored.name}_bias"
        single = units.size == 1 and codes.size != 1
        given = (
            self.edits.stored(f"{name}_codes", codes),
            self.edits.stored(f"{name}_scale", units.reshape(()) if single else units),
            self.edits.stored(
                f"{name}_zero_point", np.zeros(() if single else units.shape, np.int32)
            ),
        )
        axis = {} if single else {"axis": 0}
        node.replace_input_with(
            2, self.edits.before(node, "DequantizeLinear", *given, name=f"{name}_decoded", **axis)
        )

    def _quantize_(self, value: Value, grid: ActivationGrid) -> None:
        native = id(value) in self.native
        if native and value.producer().op_type in ("Relu", "Clip"):
            # Codes saturate where the activation would: it needs no node.
            source = value.producer().inputs[0]
            self.edits.bypass_(value.producer())
            value = source
        readers = self.edits.uses(value)
        name = value.name
        codes = self.edits.after(value, "QuantizeLinear", *self._scales(grid), name=f"{name}_codes")
        for reader, place in readers:
            if native or (id(reader) in self.layers and place == 0):
                self._read_(reader, place, codes, grid, name)
        if native and value.is_graph_output():
            self._output_(value, codes, grid)

    def _read_(
        self, reader: Node, place: int, codes: Value, grid: ActivationGrid, name: str
    ) -> None:
        if place == 0 and id(reader.outputs[0]) in self._moved:
            self._move_(reader, codes, grid)
        elif reader.op_type in ("Shape", "Size"):
            reader.replace_input_with(0, codes)
        else:
            rounded = self.edits.before(
                reader, "DequantizeLinear", codes, *self._scales(grid), name=f"{name}_rounded"
            )
            reader.replace_input_with(place, rounded)

    def _move_(self, node: Node, codes: Value, grid: ActivationGrid) -> None:
        """Let an operator move codes instead of floats."""
        node.replace_input_with(0, codes)
        if node.op_type == "Pad":
            zero = self.edits.stored("padding", np.uint8(grid.zero_point))
            if len(node.inputs) < 3:
                node.resize_inputs(3)
            node.replace_input_with(2, zero)
        moved = node.outputs[0]
        name = moved.name
        readers = self.edits.uses(moved)
        moved.type = codes.type
        for reader, place in readers:
            self._read_(reader, place, moved, grid, name)
        if moved.is_graph_output():
            self._output_(moved, moved, grid)

    def _output_(self, value: Value, codes: Value, grid: ActivationGrid) -> None:
        """Give an output of the graph floats again, under its name."""
        graph, name = self.edits.graph, value.name
        place = list(graph.outputs).index(value)
        floats = self.edits.after(
            codes, "DequantizeLinear", *self._scales(grid), name=f"{name}_out"
        )
        floats.type, floats.shape = value.type, value.shape
        graph.outputs[place] = floats
        value.name, floats.name = floats.name, name

    def _scales(self, grid: ActivationGrid) -> tuple[Value, Value]:
        return (
            self.edits.stored("scale", np.float32(grid.scale)),
            self.edits.stored("zero_point", np.uint8(grid.zero_point)),
        )
