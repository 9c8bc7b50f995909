"""Tensors that the forward computes of numbers alone: the same in every run, and cut where they are used."""

from __future__ import annotations

import re

import torch
from torch import fx

from karikomi.torch.internals import schema_of

FILLED = ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
"""Operators that fill a tensor with one number: a smaller one has the same."""

_RANDOM = re.compile("rand|dropout|bernoulli|normal|multinomial|exponential|uniform")


def constants_of(graph: fx.Graph) -> frozenset[str]:
    """Return the names of the nodes that depend on no input and no stored tensor, and that nothing else writes to."""
    written: set[fx.Node] = set()
    while True:
        found: set[fx.Node] = set()
        for node in graph.nodes:
            known = node.op == "call_function" and node not in written
            if known and not _RANDOM.search(str(node.target)):
                found.update([node] if found.issuperset(node.all_input_nodes) else [])
        new = {
            base
            for node in graph.nodes
            if node not in found and _writes(node)
            for base in _bases(node)
        } - written
        if not new:
            return frozenset(
                n.name for n in found if not _is_filled(n) or not found.isdisjoint(n.users)
            )
        written |= new


def _is_filled(node: fx.Node) -> bool:
    return any(f".{name}." in str(node.target) for name in FILLED)


def used_outside(node: fx.Node, constants: frozenset[str]) -> list[fx.Node]:
    """Return the users of a node that are no constants themselves."""
    return [user for user in node.users if user.name not in constants]


def _writes(node: fx.Node) -> bool:
    schema = schema_of(node.target)
    return schema is not None and schema.is_mutable


def _bases(node: fx.Node) -> list[fx.Node]:
    """Return what an operator writes to: its first argument, and what that can be a view of."""
    found: list[fx.Node] = []
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        found.append(node)
    return found


def cut_before_users_(
    node: fx.Node, constants: frozenset[str], kept: dict[int, torch.Tensor]
) -> None:
    """Let the users of a constant that are none themselves see only the kept indices of each axis."""
    module = node.graph.owning_module
    assert module is not None  # noqa: S101
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    for axis, places in kept.items():
        module.register_buffer(f"_{node.name}_{axis}", places.to(device))
    for user in used_outside(node, constants):
        with node.graph.inserting_before(user):
            small = node
            for axis in kept:
                stored = node.graph.get_attr(f"_{node.name}_{axis}")
                small = node.graph.call_function(
                    torch.ops.aten.index_select.default, (small, axis, stored)
                )
        user.replace_input_with(node, small)
