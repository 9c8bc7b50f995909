"""Trace a module as a chain of layers, and map each input of a layer to a unit of the one before.

The forward is traced (`torch.fx`) and run once with an integer label per unit of a layer:
element-wise operations keep the labels, data movement is applied to them by torch
itself, the next layer ends them. Any other operation is unsupported; its name and source line are in the error.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import fx, nn

from karikomi.errors import KarikomiError, Unsupported
from karikomi.torch.modules.layer_types import (
    ELEMENTWISE,
    LAYERS,
    NORMS,
    POOLED_AXES,
    RESHAPES,
    SHAPE_QUERIES,
)
from karikomi.torch.tracing.source_line import called_at, raised_at

Inputs = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Link:
    """Two successive layers of a chain, and the operations between them.

    `columns`: for each input (feature or channel) of `reader`, the unit of `layer` it comes from.
    `norms`: normalisations in between, each with its columns. `fixed`: why the width of `layer`
    cannot change, or None.
    """

    name: str
    layer: nn.Module
    reader_name: str
    reader: nn.Module
    columns: np.ndarray
    norms: tuple[tuple[nn.Module, np.ndarray], ...]
    fixed: str | None


@dataclass(frozen=True, slots=True)
class ChainGraph:
    """The links of a chain in order, and its last layer, whose units are outputs."""

    links: tuple[Link, ...]
    last_name: str
    last: nn.Module

    def widths(self) -> dict[str, int]:
        """Return layer name -> number of units."""
        inner = {link.name: len(_weight(link.layer)) for link in self.links}
        return {**inner, self.last_name: len(_weight(self.last))}


@dataclass(slots=True)
class _Open:
    """A layer before its reader is found."""

    name: str
    layer: nn.Module
    norms: tuple[tuple[nn.Module, np.ndarray], ...] = ()
    fixed: str | None = None


def read_chain(module: nn.Module, inputs: Inputs) -> ChainGraph:
    """Return a module in evaluation mode as a chain, or raise `Unsupported` with the reason.

    Source: index propagation on a traced graph, as opposed to tables of operators by name as in
    Fang et al. 2023 (DepGraph); here for one chain, without branches.
    """
    tracer = fx.Tracer()
    tracer.record_stack_traces = True
    try:
        graph = tracer.trace(module)
    except Exception as error:
        raise Unsupported(
            f"the forward cannot be traced ({type(error).__name__}: {error})",
            where="torch.shrink",
            hint=raised_at(error, after=__file__),
        ) from error
    calls = [node for node in graph.nodes if _chain_layer(module, node) is not None]
    if not calls:
        raise Unsupported(
            "there is no Linear or Conv layer to shrink",
            where="torch.shrink",
            got=type(module).__name__,
            allowed="layers called as modules",
        )
    reader = _Reader(module, graph, calls[-1])
    try:
        reader.run(*inputs)
    except KarikomiError:
        raise
    except Exception as error:
        raise Unsupported(
            "the traced forward does not run with these widths", where="torch.shrink", got=error
        ) from error
    last = str(calls[-1].target)
    return ChainGraph(tuple(reader.links), last, module.get_submodule(last))


def unit_axis(layer: nn.Module) -> int:
    """Return the unit axis of a layer's input and output, from the end."""
    return -1 if isinstance(layer, nn.Linear) else 1 - _weight(layer).dim()


class _Reader(fx.Interpreter):
    """Runs the graph with labels: node -> tensor of its shape with the unit of each entry."""

    def __init__(self, module: nn.Module, graph: fx.Graph, last: fx.Node) -> None:
        super().__init__(module, graph=graph)
        self.extra_traceback = False  # it would append to the text of KarikomiErrors
        self.links: list[Link] = []
        self._last = last
        self._labels: dict[fx.Node, torch.Tensor] = {}
        self._open: dict[fx.Node, _Open] = {}
        self._readers: dict[fx.Node, fx.Node] = {}
        self._claimed: set[str] = set()
        owners = (
            parameter for part in module.modules() for parameter in part.parameters(recurse=False)
        )
        self._owners = Counter(id(parameter) for parameter in owners)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, then propagate the labels through it."""
        result = super().run_node(n)
        labelled = [node for node in n.all_input_nodes if node in self._labels]
        layer = _chain_layer(self.module, n)
        if labelled and not _is_shape_query(n):
            self._follow(n, self._only(n, labelled), result, layer)
        elif layer is not None:
            self._begin(n, layer, result)
        return result

    def _only(self, node: fx.Node, labelled: list[fx.Node]) -> fx.Node:
        if len(labelled) > 1:
            self._refuse(node, f"joins the branches {labelled[0].name} and {labelled[1].name}")
        other = self._readers.setdefault(labelled[0], node)
        if other is not node:
            self._refuse(node, f"and {other.name} both read {labelled[0].name}, which is a branch")
        return labelled[0]

    def _follow(self, node: fx.Node, source: fx.Node, result: Any, layer: nn.Module | None) -> None:
        labels, begun = self._labels[source], self._open[source]
        if layer is not None:
            self._end(node, layer, labels, begun)
            self._begin(node, layer, result)
            return
        others = [self.env[item] for item in node.all_input_nodes if item is not source]
        if any(isinstance(value, torch.Tensor) for value in others):
            self._refuse(node, "takes a second tensor")
        if not isinstance(result, torch.Tensor):
            self._refuse(node, "does not return one tensor")
        self._labels[node] = self._passed(node, source, labels, result)
        self._open[node] = begun

    def _passed(
        self, node: fx.Node, source: fx.Node, labels: torch.Tensor, result: torch.Tensor
    ) -> torch.Tensor:
        """Return the labels after an operation between two layers of the chain."""
        operation: Any = node.target
        if node.op == "call_module":
            operation = self.fetch_attr(str(node.target))
        key = type(operation) if isinstance(operation, nn.Module) else operation
        if key in NORMS and operation.running_mean is not None:
            self._claim(node, operation)
            self._open[source].norms += ((operation, self._columns(node, labels, 1)),)
            return labels
        if key in ELEMENTWISE and result.shape == labels.shape:
            return labels
        if key in POOLED_AXES:
            return self._pooled(node, labels, POOLED_AXES[key], result)
        if key in RESHAPES:
            return self._reshaped(node, source, labels)
        self._refuse(node, "is not known to keep units apart")

    def _begin(self, node: fx.Node, layer: nn.Module, result: torch.Tensor) -> None:
        self._claim(node, layer)
        if node is self._last:
            return
        shape = [1] * result.dim()
        shape[unit_axis(layer)] = -1
        units = torch.arange(len(_weight(layer)), dtype=torch.int32)
        self._labels[node] = units.view(shape).expand(result.shape)
        self._open[node] = _Open(str(node.target), layer)

    def _end(self, node: fx.Node, layer: nn.Module, labels: torch.Tensor, begun: _Open) -> None:
        self.links.append(
            Link(
                name=begun.name,
                layer=begun.layer,
                reader_name=str(node.target),
                reader=layer,
                columns=self._columns(node, labels, unit_axis(layer)),
                norms=begun.norms,
                fixed=begun.fixed,
            )
        )

    def _claim(self, node: fx.Node, layer: nn.Module) -> None:
        if node.target in self._claimed:
            self._refuse(node, "is called twice")
        self._claimed.add(str(node.target))
        stored = dict(layer.named_parameters(recurse=False, remove_duplicate=False))
        for leaf in ("weight", "bias"):
            parameter = getattr(layer, leaf, None)
            if parameter is not None and leaf not in stored:
                self._refuse(node, f"has a {leaf} that a hook computes; make it permanent first")
            if parameter is not None and self._owners[id(parameter)] > 1:
                self._refuse(node, f"shares its {leaf} with another layer")

    def _columns(self, node: fx.Node, labels: torch.Tensor, axis: int) -> np.ndarray:
        rows = labels.movedim(axis, -1).reshape(-1, labels.shape[axis])
        if not bool((rows == rows[0]).all()):
            self._refuse(node, "reads units of several places at once")
        return rows[0].numpy().astype(np.int64)

    def _pooled(
        self, node: fx.Node, labels: torch.Tensor, axes: int, result: torch.Tensor
    ) -> torch.Tensor:
        corner = labels[(..., *[slice(0, 1)] * axes)]
        if not bool((labels == corner).all()):
            self._refuse(node, "pools over units")
        return corner.expand(result.shape)

    def _reshaped(self, node: fx.Node, source: fx.Node, labels: torch.Tensor) -> torch.Tensor:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if not node.args or node.args[0] is not source:
            self._refuse(node, "takes its tensor by keyword")
        moved = getattr(self, node.op)(node.target, (labels.contiguous(), *args[1:]), kwargs)
        for axis, size in enumerate(_written_sizes(node)):
            written = isinstance(size, int) and size > 0
            if written and bool((moved.amin(axis) != moved.amax(axis)).any()):
                place = f"{node.target} with {size} {called_at(node, after=__file__)}"
                self._open[source].fixed = f"the forward writes its width: {place}".rstrip()
        return moved

    def _refuse(self, node: fx.Node, why: str) -> NoReturn:
        raise Unsupported(
            f"{self._named(node)} {why}",
            where="torch.shrink",
            allowed="one chain of Linear, Conv, BatchNorm, activations, pooling and flatten",
            hint=called_at(node, after=__file__),
        )

    def _named(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{type(self.fetch_attr(str(node.target))).__name__} {str(node.target)!r}"
        return str(node.target) if node.op == "call_method" else re.sub(r"_\d+$", "", node.name)


def _chain_layer(module: nn.Module, node: fx.Node) -> nn.Module | None:
    if node.op != "call_module":
        return None
    layer = module.get_submodule(str(node.target))
    return layer if type(layer) in LAYERS and getattr(layer, "groups", 1) == 1 else None


def _is_shape_query(node: fx.Node) -> bool:
    attribute = node.args[1] if node.target is getattr else node.target
    return node.op in ("call_method", "call_function") and attribute in SHAPE_QUERIES


def _written_sizes(node: fx.Node) -> tuple[Any, ...]:
    """Return the size arguments of a view or reshape, empty for a flatten."""
    if node.target not in ("view", "reshape", torch.reshape):
        return ()
    sizes = node.args[1:] or tuple(node.kwargs.values())
    return tuple(sizes[0]) if isinstance(sizes[0], list | tuple) else sizes


def _weight(layer: nn.Module) -> torch.Tensor:
    return layer.get_parameter("weight")
