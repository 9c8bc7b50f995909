"""Branches that are added to a stream which goes past them: what only they compute can go whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from karikomi.shrink.label_planes import Labelled
from karikomi.torch.internals import schema_of
from karikomi.torch.labelling.label_run import Propagated, call_of, name_of, shape_of
from karikomi.torch.modules.deep_copies import copied, undisturbed

VIEWS = frozenset(
    """
    view reshape flatten unflatten squeeze unsqueeze permute transpose t select narrow slice detach alias
    expand getitem unbind chunk split split_with_sizes
    """.split()
)
PRODUCTS = ("linear", "conv", "matmul", "mm", "bmm", "addmm", "einsum", "scaled_dot", "lstm", "gru")


@dataclass(frozen=True, slots=True)
class Branch:
    """A branch of a graph, by names of nodes.

    `end`: what is added to the stream at `site`. `nodes`: all that nothing else reads, the end among them, in order.
    `weights`: stored tensors that only these read. `axes`: those along which the stream has units.
    """

    end: str
    site: str
    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    axes: tuple[int, ...]


def branches_of(graph: fx.GraphModule, found: Propagated) -> list[Branch]:
    """Return the branches with a stored weight that are added to what does not need them, in order of their ends.

    What a branch reads has to reach the other summand too. Where both summands are such, the one with more products
    is the branch.
    """
    order = {node: place for place, node in enumerate(graph.graph.nodes)}
    listed = []
    for node in order:
        if node.op != "call_function" or name_of(node) != "add" or len(node.all_input_nodes) != 2:
            continue
        call = call_of(node)
        shapes = {shape_of(source.meta.get("val")) for source in node.all_input_nodes}
        if call["alpha"] != 1 or len(shapes) != 1:
            continue
        ends = node.all_input_nodes
        pairs = [(end, _only_read_by(end, node)) for end in ends]
        good = [
            (end, own)
            for (end, own), (other, _) in zip(pairs, reversed(pairs), strict=True)
            if _products(own)
            and not _carries(end, own)
            and _goes_past(own, other)
            and not _writes_outside(own)
        ]
        if good:
            end, own = max(good, key=lambda pair: _products(pair[1]))
            listed.append(_branch(end, sorted(own, key=order.__getitem__), call.site, found))
    return listed


def _branch(end: fx.Node, own: list[fx.Node], site: str, found: Propagated) -> Branch:
    weights = tuple(str(node.target) for node in own if node.op == "get_attr")
    value = found.values[end.name]
    axes = tuple(sorted(value.axes)) if isinstance(value, Labelled) else ()
    return Branch(end.name, site, tuple(node.name for node in own), weights, axes)


def _only_read_by(end: fx.Node, reader: fx.Node) -> set[fx.Node]:
    """Return a node and all before it that nothing else than `reader` needs; none if others read it."""
    if set(end.users) != {reader}:
        return set()
    own, waiting = {end}, list(end.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node.op != "placeholder" and node not in own and own.issuperset(node.users):
            own.add(node)
            waiting += node.all_input_nodes
    return own


def _products(nodes: Iterable[fx.Node]) -> int:
    return sum(
        node.op == "call_function"
        and name_of(node).startswith(PRODUCTS)
        and any(source.op == "get_attr" for source in node.all_input_nodes)
        for node in nodes
    )


def _carries(end: fx.Node, own: set[fx.Node]) -> bool:
    """Return whether an end is itself a sum with what others compute: then it is the stream."""
    sums = [end]
    while sums:
        node = sums.pop()
        if node.op == "call_function" and name_of(node) == "add":
            if not own.issuperset(node.all_input_nodes):
                return True
            sums += node.all_input_nodes
    return False


def _goes_past(own: set[fx.Node], other: fx.Node) -> bool:
    """Return whether all that a branch reads is needed for the other summand, and is not its sole source."""
    read = {
        source
        for node in own
        for source in node.all_input_nodes
        if source not in own and source.op != "get_attr"
    }
    behind, waiting = {other}, [other]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in behind:
                behind.add(source)
                waiting.append(source)
    return bool(read) and read <= behind


def _writes_outside(own: set[fx.Node]) -> bool:
    """Return whether a branch writes in place to what others read."""
    for node in own:
        schema = schema_of(node.target) if node.op == "call_function" else None
        if schema is None or not schema.is_mutable:
            continue
        base = node.args[0]
        while isinstance(base, fx.Node) and base in own and name_of(base) in VIEWS:
            base = base.args[0]
        if base not in own or (isinstance(base, fx.Node) and base.op == "get_attr"):
            return True
    return False


class Mean:
    """The mean of what a branch adds, one number for each unit of the stream."""

    def __init__(self, branch: Branch) -> None:
        self._axes = branch.axes
        self._sum: torch.Tensor | None = None
        self._count = 0

    def add(self, value: torch.Tensor) -> None:
        """Count what a run added."""
        others = [axis for axis in range(value.dim()) if axis not in self._axes]
        part = value.double().sum(others, keepdim=True) if others else value.double()
        self._sum = part if self._sum is None else self._sum + part
        self._count += math.prod(value.shape[axis] for axis in others)

    def constant(self) -> torch.Tensor:
        """Return the mean in a shape that is broadcast to the values, without leading axes of size 1."""
        assert self._sum is not None  # noqa: S101  (there is a run)
        mean = self._sum / max(self._count, 1)
        while mean.dim() and mean.shape[0] == 1:
            mean = mean[0]
        return mean


class Without(fx.Interpreter):
    """Runs a graph with the ends of some branches as constants, and without what only these need.

    `constants`: end -> constant. `branches`: of which nothing else is run. `watched`: end -> the mean to which its
    value is added.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        branches: Iterable[Branch],
        constants: Mapping[str, torch.Tensor],
        watched: Mapping[str, Mean] | None = None,
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._constants, self._watched = constants, watched or {}
        self._needless = {name for branch in branches for name in branch.nodes}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, or return the constant that is known of it."""
        known = self._constants.get(n.name)
        if known is not None:
            value = n.meta["val"]
            return known.to(value.dtype).expand(shape_of(value)).clone()
        if n.name in self._needless:
            return None
        result = super().run_node(n)
        if n.name in self._watched:
            self._watched[n.name].add(result)
        return result

    def of(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Return the outputs in the form in which the module returns them."""
        graph: Any = self.module.graph
        with undisturbed(self.module):
            flat = graph.process_inputs(*inputs, **options)
            return graph.process_outputs(self.run(*flat, enable_io_processing=False))


@torch.no_grad()
def without(
    graph: fx.GraphModule, branches: Iterable[Branch], constants: dict[str, torch.Tensor]
) -> fx.GraphModule:
    """Return a copy of a graph in which the ends of branches are constants, without what only they need."""
    small = copied(graph)
    nodes = {node.name: node for node in small.graph.nodes}
    for branch in branches:
        if branch.end not in {node.name for node in small.graph.nodes}:
            # It was a part of one that is gone.
            continue
        end = nodes[branch.end]
        (reader,) = end.users
        small.register_buffer(
            f"_constant_{end.name}", constants[branch.end].to(end.meta["val"].dtype)
        )
        with small.graph.inserting_before(reader):
            stored = small.graph.get_attr(f"_constant_{end.name}")
        stored.meta = {"val": constants[branch.end]}
        if reader.args[0] is end:
            # It may be written in place, and a constant is smaller than the sum.
            reader.target = torch.ops.aten.add.Tensor
        reader.replace_input_with(end, stored)
        left = {node.name for node in small.graph.nodes}
        for name in reversed(branch.nodes):
            if name in left and not nodes[name].users:
                small.graph.erase_node(nodes[name])
    small.delete_all_unused_submodules()
    small.graph.lint()
    small.recompile()
    return small
