"""The graph of one forward pass, and which parameters its calls read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from karikomi.torch.exporting.exported import exported
from karikomi.torch.labelling.label_run import call_of, name_of
from karikomi.torch.modules.parameters import check_values
from karikomi.torch.tracing.batches import Batch, batch_of
from karikomi.torch.tracing.eval_mode import steady

CONVOLUTIONS = tuple(f"conv{axes}d" for axes in (1, 2, 3))
TRANSPOSED = tuple(f"conv_transpose{axes}d" for axes in (1, 2, 3))
LAYERS = ("linear", *CONVOLUTIONS, *TRANSPOSED)


class AdjacentLayers:
    """The exported graph of a module in eval mode; `inputs`: a tensor, the tuple of arguments, or a mapping.

    Raises `Unsupported` where `torch.export` does not take the module.
    """

    def __init__(self, module: nn.Module, inputs: Any, *, where: str) -> None:
        self.module = module
        parameters = dict(module.named_parameters(remove_duplicate=False))
        check_values(parameters, where=where)
        device = next((item.device for item in parameters.values()), torch.device("cpu"))
        batch = (
            inputs
            if isinstance(inputs, Batch)
            else batch_of((inputs, None), device, module=module, where=where)
        )
        with steady(module, fresh=False):
            graph = exported(module, batch.positional, dict(batch.named), where=where)
        self.nodes = list(graph.graph.nodes)
        named = {**parameters, **dict(module.named_buffers(remove_duplicate=False))}
        self._identity = {name: id(tensor) for name, tensor in named.items()}
        self._readings: Counter[int] = Counter()
        for node in self.nodes:
            if node.op == "get_attr" and str(node.target) in self._identity:
                self._readings[self._identity[str(node.target)]] += len(node.users)

    def calls(self, *names: str) -> Iterator[fx.Node]:
        """Yield the calls of operators of these names, in the order of the forward pass."""
        for node in self.nodes:
            if node.op == "call_function" and name_of(node) in names:
                yield node

    def parameter(self, node: fx.Node, argument: str) -> str | None:
        """Return the name of the parameter or buffer that an argument of a call is, if it is one."""
        given = call_of(node).arguments.get(argument)
        return str(given.target) if isinstance(given, fx.Node) and given.op == "get_attr" else None

    def read_once(self, name: str) -> bool:
        """Return whether a parameter has one reader, under whichever of its names."""
        return self._readings[self._identity[name]] == 1

    def owner(self, name: str) -> nn.Module:
        """Return the layer that has a parameter."""
        return self.module.get_submodule(name.rpartition(".")[0])

    def plain(self, name: str | None) -> bool:
        """Return whether a name is a parameter that its layer holds itself and that one call reads."""
        if name is None or name not in self._identity or not self.read_once(name):
            return False
        return name.rpartition(".")[2] in dict(self.owner(name).named_parameters(recurse=False))


def argument(node: fx.Node, name: str) -> Any:
    """Return an argument of a call by name, defaults included; None where the operator has none of this name."""
    return call_of(node).arguments.get(name)


def rank_of(node: fx.Node) -> int:
    """Return the number of axes of a node's value."""
    return node.meta["val"].dim()


def only_user(node: fx.Node) -> fx.Node | None:
    """Return the call that alone reads a value."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None
