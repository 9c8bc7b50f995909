"""Run an exported graph on labels: one rule per operator, and none for data movement, which torch does itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx

from karikomi.errors import Unsupported
from karikomi.shrink.account import OUTPUT
from karikomi.shrink.label_planes import Labelled, Shape, along, varying
from karikomi.shrink.labels import Classes
from karikomi.shrink.meetings import Meetings
from karikomi.torch.internals import schema_of
from karikomi.torch.labelling.constants import constants_of, used_outside
from karikomi.torch.tracing.source_line import called_at

Value = Labelled | list[Any]
"""The labels of what a node returns: of a tensor, or a list for several tensors."""

NO_RULE = "there is no rule for this operator"


@dataclass(frozen=True, slots=True)
class Call:
    """A call of an operator: the node, the name of the operator, its arguments by name, and where it is written."""

    node: fx.Node
    name: str
    arguments: dict[str, Any]
    site: str

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


Rule = Callable[["LabelRun", Call], Value]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the operators with these names, without ``aten.``."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


@dataclass(frozen=True, slots=True)
class Propagated:
    """Labels of every node of a graph.

    `values`: name of a node -> labels. `classes`: what goes together. `statistics`: name -> place of nodes that
    compute a statistic (or a softmax) over entries of which some can go; `measured`: name -> the labels of
    these. `constants`: nodes that are the same in every run. `unknown`: place -> operators without a rule.
    `ends`: node, place, and the labels that a sum ended there.
    """

    values: dict[str, Value]
    classes: Classes
    statistics: dict[str, str]
    unknown: dict[str, str]
    ends: tuple[tuple[str, str, np.ndarray], ...] = ()
    measured: dict[str, np.ndarray] = field(default_factory=dict)
    constants: frozenset[str] = frozenset()

    def changed_statistics(self, kept: np.ndarray) -> dict[str, str]:
        """Return name -> place of the nodes over whose entries some go."""
        return {n: site for n, site in self.statistics.items() if not kept[self.measured[n]].all()}


class LabelRun(Meetings):
    """One propagation through a graph module; if `exact`, no statistic of the network may change."""

    def __init__(self, module: fx.GraphModule, *, whole: bool = False, exact: bool = False) -> None:
        super().__init__(whole=whole)
        self.module = module
        self.exact = exact
        self.values: dict[str, Value] = {}
        self.statistics: dict[str, str] = {}
        self.measured: dict[str, np.ndarray] = {}
        self.unknown: dict[str, str] = {}
        self._constants = constants_of(module.graph)
        self._ends: list[tuple[str, str, np.ndarray]] = []
        self._stored: dict[tuple[Any, ...], Labelled] = {}

    def run(self) -> Propagated:
        """Propagate through all nodes."""
        for node in self.module.graph.nodes:
            before = len(self.ended)
            self.values[node.name] = self._of_node(node)
            site = call_of(node).site if len(self.ended) > before else ""
            self._ends += [(node.name, site, labels) for labels in self.ended[before:]]
        self.make_products(
            (value, call_of(node).site)
            for node in self.module.graph.nodes
            for found in [self.values[node.name]]
            for value in (found if isinstance(found, list) else [found])
        )
        return Propagated(
            self.values,
            self.labels.classes(),
            self.statistics,
            self.unknown,
            tuple(self._ends),
            self.measured,
            self._constants,
        )

    def value(self, argument: Any) -> Labelled:
        """Return the labels of an argument: of a node, or none for a number or nothing."""
        if isinstance(argument, fx.Node):
            found = self.values[argument.name]
            if isinstance(found, Labelled):
                return found
        return Labelled(())

    def fresh(self, owner: str, shape: Shape, axes: Sequence[int] | None = None) -> Labelled:
        """Return a value with new labels along each of its axes, or along `axes`."""
        chosen = range(len(shape)) if axes is None else axes
        planes = tuple(
            along(self.labels.new(owner, axis, shape[axis]), len(shape), axis)
            for axis in chosen
            if shape[axis] > 1
        )
        return Labelled(shape, planes)

    def over_statistics(self, call: Call, value: Labelled, axes: Sequence[int]) -> Labelled:
        """Return the value of an operator that measures something over `axes`.

        It is noted if entries along these can go; where outputs have to stay the same, none of them can.
        """
        rank = len(value.shape)
        inside = {axis % rank for axis in axes}
        current = self.current(value, call.site)
        over = [plane for plane in current.planes if inside & set(varying(plane))]
        if not over:
            return value
        if self.exact:
            return self.fix(current, f"{call.site} measures over it", inside)
        self.statistics[call.node.name] = call.site
        self.measured[call.node.name] = np.unique(
            np.concatenate([labels.ravel() for labels in over])
        )
        return value

    def stored(self, name: str) -> torch.Tensor:
        """Return a parameter, a buffer or a constant by name."""
        found: Any = self.module
        for part in name.split("."):
            found = getattr(found, part)
        return found

    def constant(self, argument: Any) -> torch.Tensor | None:
        """Return the tensor of an argument that is stored, through what only copies it; else None."""
        while isinstance(argument, fx.Node) and argument.op == "call_function":
            if name_of(argument) not in ("lift_fresh_copy", "clone", "detach", "alias", "to"):
                return None
            argument = argument.args[0]
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            return self.stored(str(argument.target))
        return None

    def _of_node(self, node: fx.Node) -> Value:
        if node.op == "get_attr":
            return self._of_stored(str(node.target))
        if node.op == "output":
            for source in node.all_input_nodes:
                self._fix_all(self.values[source.name], OUTPUT)
            return Labelled(())
        if node.op != "call_function":
            return bare(node)
        call = call_of(node)
        _check_sizes(call)
        if call.name == "getitem":
            found = self.values[node.args[0].name]  # type: ignore[union-attr]
            return found[node.args[1]] if isinstance(found, list) else bare(node)  # type: ignore[index]
        if node.name in self._constants and node.meta.get("val") is not None:
            return self._of_constant(node)
        if not isinstance(node.meta.get("val"), torch.Tensor | tuple | list):
            return Labelled(())
        if call.name in RULES:
            return RULES[call.name](self, call)
        return self.refuse(call)

    def _of_constant(self, node: fx.Node) -> Value:
        """Return new labels for a constant that is used by something else, if it is a tensor of numbers."""
        value = node.meta["val"]
        used = used_outside(node, self._constants)
        if not used or not isinstance(value, torch.Tensor) or not _has_units(value):
            return bare(node)
        return self.fresh("", shape_of(value))

    def refuse(self, call: Call, reason: str = NO_RULE) -> Value:
        """Fix all that reaches an operator whose rule does not cover the call."""
        text = f"{reason}: {call.site}"
        reached = [
            source for source in call.node.all_input_nodes if _labels_of(self.values[source.name])
        ]
        for source in reached:
            self._fix_all(self.values[source.name], text)
        if reached:
            self.unknown[call.site] = reason
        return bare(call.node)

    def _fix_all(self, value: Value, reason: str) -> None:
        for part in value if isinstance(value, list) else [value]:
            self.fix(part, reason)

    def _of_stored(self, name: str) -> Value:
        tensor = self.stored(name)
        if not isinstance(tensor, torch.Tensor):
            return Labelled(())
        if not _has_units(tensor):
            return Labelled(tuple(tensor.shape))
        key = (tensor.data_ptr() or id(tensor), tuple(tensor.shape), tensor.stride())
        if key not in self._stored:
            self._stored[key] = self.fresh(name, tuple(tensor.shape))
        return self._stored[key]


def bare(node: fx.Node) -> Value:
    """Return what a node returns, without labels."""
    found = node.meta.get("val")
    if isinstance(found, tuple | list):
        return [Labelled(shape_of(part)) for part in found]
    return Labelled(shape_of(found))


def shape_of(value: Any) -> Shape:
    """Return the shape of a traced tensor, of a symbolic size the one of the example; () of what is no tensor."""
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(size_of(size) for size in value.shape)


def _check_sizes(call: Call) -> None:
    """Raise `Unsupported` for a result whose shape depends on the data."""
    found = call.node.meta.get("val")
    for value in found if isinstance(found, tuple | list) else [found]:
        sizes = value.shape if isinstance(value, torch.Tensor) else ()
        if any(isinstance(size, torch.SymInt) and size.node.hint is None for size in sizes):
            raise Unsupported(
                "the shape of a result depends on the data",
                where="torch.shrink",
                got=call.site,
                hint="pick a fixed number of entries (index_select, topk, where), or shrink the parts before and after",
            )


def size_of(size: Any) -> int:
    """Return a size as a number, that of the example for a symbolic one."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _has_units(tensor: torch.Tensor) -> bool:
    """Return whether entries of a tensor can be those of units: of integers, which are places, they are not."""
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool


def _labels_of(value: Value) -> bool:
    return any(part.planes for part in (value if isinstance(value, list) else [value]))


def name_of(node: fx.Node) -> str:
    """Return the name of an operator: of ``aten.add_.Tensor`` it is ``add``, of another library with its prefix."""
    target = node.target
    schema = schema_of(target)
    if schema is None:
        return getattr(target, "__name__", str(target))
    space, name = schema.name.split("::")
    name = name.rstrip("_") if not name.startswith("__") else name
    return name if space == "aten" else f"{space}.{name}"


def call_of(node: fx.Node) -> Call:
    """Return a node as a call with named arguments, defaults included."""
    name = name_of(node)
    place = called_at(node, after="")
    if not place and (layer := layer_of(node)):
        place = f"in {layer}"
    site = f"{name} {place}".strip()
    target = node.target
    arguments: dict[str, Any] = {}
    schema = schema_of(target)
    if schema is not None:
        for place_of, argument in enumerate(schema.arguments):
            if place_of < len(node.args):
                arguments[argument.name] = node.args[place_of]
            else:
                default = argument.default_value if argument.has_default_value() else None
                arguments[argument.name] = node.kwargs.get(argument.name, default)
    return Call(node, name, arguments, site)


def layer_of(node: fx.Node) -> str:
    """Return the path of the module in whose forward a node is."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).partition("@")[0] if stack else ""


def with_arguments(node: fx.Node, new: dict[str, Any]) -> None:
    """Set arguments of a node by name."""
    schema = schema_of(node.target).arguments
    for place, argument in enumerate(schema):
        if argument.name in new:
            if place < len(node.args):
                node.update_arg(place, new[argument.name])
            else:
                node.update_kwarg(argument.name, new[argument.name])
