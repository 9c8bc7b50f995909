"""What comes behind a layer: a batch normalisation that takes a constant, and a sum with another branch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from karikomi.keras.internals import all_layers, graph_of, nodes_of
from karikomi.keras.labelling.label_run import kind_of

# What they put out in inference is what they read.
NOISES = ("layers.Dropout", "layers.SpatialDropout1D", "layers.SpatialDropout2D")
NOISES += ("layers.SpatialDropout3D", "layers.StochasticDepth", "layers.Identity")
SUMS = ("layers.Add", "ops.Add")


@dataclass(frozen=True, slots=True)
class Successor:
    """`norm`: the batch normalisation that alone reads what a layer makes. `added`: what makes the other summand."""

    norm: Any = None
    added: Any = None


class Successors:
    """The readers of each tensor of a model, those of nested models too."""

    def __init__(self, model: Any) -> None:
        self._readers: dict[int, list[Any]] = {}
        self._makers: dict[int, Any] = {}
        self._made: dict[int, list[Any]] = {}
        self._ends: set[int] = set()
        for graph in _graphs(model):
            self._ends |= {id(tensor) for tensor in graph.outputs}
            for node in nodes_of(graph):
                for tensor in node.input_tensors:
                    self._readers.setdefault(id(tensor), []).append(node)
                for tensor in node.outputs:
                    self._makers[id(tensor)] = node
                self._made.setdefault(id(node.operation), []).append(node)

    def of(self, layer: Any) -> Successor:
        """Return what follows a layer that is called once."""
        nodes = self._made.get(id(layer), [])
        if len(nodes) != 1:
            return Successor()
        node, norm = nodes[0], None
        reader = self._only(node)
        if reader is not None and kind_of(reader.operation) == "layers.BatchNormalization":
            node, norm = reader, reader.operation
        return Successor(norm, self._summand(node))

    def operations(self) -> Iterator[Any]:
        """Yield every layer and operation that makes a tensor."""
        yield from {id(node.operation): node.operation for node in self._makers.values()}.values()

    def _only(self, node: Any) -> Any:
        """Return the node that alone reads what another one makes, or nothing."""
        if len(node.outputs) != 1 or id(node.outputs[0]) in self._ends:
            return None
        readers = self._readers.get(id(node.outputs[0]), [])
        return readers[0] if len(readers) == 1 else None

    def _summand(self, node: Any) -> Any:
        reader = self._only(node)
        while reader is not None and kind_of(reader.operation) in NOISES:
            node, reader = reader, self._only(reader)
        if reader is None or kind_of(reader.operation) not in SUMS:
            return None
        others = [tensor for tensor in reader.input_tensors if tensor is not node.outputs[0]]
        same = all(tuple(tensor.shape) == tuple(node.outputs[0].shape) for tensor in others)
        if len(reader.input_tensors) != 2 or len(others) != 1 or not same:
            return None
        maker = self._makers.get(id(others[0]))
        while maker is not None and kind_of(maker.operation) in NOISES:
            maker = self._makers.get(id(maker.input_tensors[0]))
        return None if maker is None or len(maker.outputs) != 1 else maker.operation


def _graphs(model: Any) -> Iterator[Any]:
    found = {
        id(graph): graph for layer in all_layers(model) if (graph := graph_of(layer)) is not None
    }
    yield from found.values()
