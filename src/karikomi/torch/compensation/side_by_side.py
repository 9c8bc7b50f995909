"""The dense and the smaller network beside each other: all batches, one operator after the other.

So each layer is re-fitted when the smaller network has been changed up to there, and every operator still
runs once per batch. In memory are the activations of all batches at one place of the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from karikomi.errors import InvalidArgument
from karikomi.shrink.label_planes import Labelled
from karikomi.torch.exporting.rewriting import Kept, owner_of
from karikomi.torch.tracing.batches import Batch


@dataclass(frozen=True, slots=True)
class Pair:
    """A dense graph, the smaller one, and what stays of the values of the first."""

    dense: fx.GraphModule
    small: fx.GraphModule
    stays: Kept


@dataclass(slots=True)
class Lane:
    """One batch in both graphs of a pair, with the values that are still needed. `held`: out of the fit."""

    pair: Pair
    batch: Batch
    held: bool
    dense: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        """Set the inputs."""
        flat = [value for _, value in inputs_of(self.batch.positional, self.batch.named)]
        for graph, values in ((self.pair.dense, self.dense), (self.pair.small, self.small)):
            values.clear()
            places = [node for node in graph.graph.nodes if node.op == "placeholder"]
            values.update({node.name: value for node, value in zip(places, flat, strict=True)})

    def kept(self, name: str) -> torch.Tensor:
        """Return what stays of the dense value of a node."""
        value, labelled = self.dense[name], self.pair.stays.values[name]
        assert isinstance(labelled, Labelled)  # noqa: S101
        for axis in sorted(labelled.axes):
            chosen = self.pair.stays.along(labelled, axis)
            if len(chosen) < value.shape[axis]:
                value = value.index_select(axis, chosen.to(value.device))
        return value


class SideBySide:
    """All lanes, advanced together."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self.lanes = lanes
        self._nodes = {
            id(graph): {node.name: node for node in graph.graph.nodes}
            for lane in lanes
            for graph in (lane.pair.dense, lane.pair.small)
        }
        first = lanes[0].pair.small
        self.order = [node.name for node in first.graph.nodes if node.op != "output"]
        for lane in lanes:
            names = [node.name for node in lane.pair.small.graph.nodes if node.op != "output"]
            if names != self.order:
                raise InvalidArgument(
                    "batches of different shapes take different ways through the network",
                    where="torch.shrink: data",
                    allowed="batches of one shape",
                )
        self._last = {key: last_reads(nodes.values()) for key, nodes in self._nodes.items()}

    def run(self) -> Iterator[fx.Node]:
        """Yield each node of the first dense graph when its dense values are known, before its smaller ones are."""
        for lane in self.lanes:
            lane.start()
        first = self._nodes[id(self.lanes[0].pair.dense)]
        for name in self.order:
            for lane in self.lanes:
                if name in first:
                    self._step(lane.pair.dense, lane.dense, name)
            if name in first:
                yield first[name]
            for lane in self.lanes:
                self._step(lane.pair.small, lane.small, name)
                self._forget(lane, name)

    def _step(self, graph: fx.GraphModule, values: dict[str, Any], name: str) -> None:
        node = self._nodes[id(graph)][name]
        if node.op == "get_attr":
            owner, leaf = owner_of(graph, str(node.target))
            values[name] = getattr(owner, leaf)
        elif node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n.name])
            values[name] = node.target(*args, **kwargs)

    def _forget(self, lane: Lane, name: str) -> None:
        """Drop the values whose last reader was this node."""
        for graph, values in ((lane.pair.dense, lane.dense), (lane.pair.small, lane.small)):
            for gone in self._last[id(graph)].get(name, ()):
                del values[gone]


def inputs_of(*values: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what values of tuples, lists and mappings are made of, in order, with its place."""
    for number, value in enumerate(values):
        place = f"{at}/{number}"
        if isinstance(value, Mapping):
            yield from inputs_of(*value.values(), at=f"{place}{list(value)}")
        elif isinstance(value, tuple | list):
            yield from inputs_of(*value, at=place)
        else:
            yield place, value


def last_reads(nodes: Iterable[fx.Node]) -> dict[str, list[str]]:
    """Return node -> the nodes of which it is the last reader."""
    last = {source.name: node.name for node in nodes for source in node.all_input_nodes}
    found: dict[str, list[str]] = {}
    for source, reader in last.items():
        found.setdefault(reader, []).append(source)
    return found
