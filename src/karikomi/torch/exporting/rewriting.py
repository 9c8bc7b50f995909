"""Rewrite an exported graph for the units that stay: smaller tensors, and every number that depends on a size."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from karikomi.errors import Unsupported
from karikomi.shrink.kept_labels import KeptLabels
from karikomi.shrink.label_planes import Labelled, is_product, kept_along
from karikomi.torch.labelling.constants import FILLED, cut_before_users_
from karikomi.torch.labelling.label_run import (
    Call,
    Propagated,
    call_of,
    layer_of,
    name_of,
    with_arguments,
)
from karikomi.torch.modules.deep_copies import copied

UNLABELLED = Labelled(())
LITERALS: dict[str, Callable[[Kept, Call, fx.Node], dict[str, Any]]] = {}


@dataclass(frozen=True, slots=True)
class Kept(KeptLabels):
    """What stays of each tensor of a graph: a boolean per label, and `values`, the labels of its nodes by name."""

    values: dict[str, Any]

    def along(self, value: Labelled, axis: int) -> torch.Tensor:
        """Return the indices that stay along an axis."""
        return torch.from_numpy(self.indices(value, axis))

    def of(self, node: Any) -> Labelled:
        """Return the labels of a node that is one tensor; none for any other argument."""
        found = self.values.get(node.name) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Labelled) else UNLABELLED


@dataclass(frozen=True, slots=True)
class Changed:
    """A number in the forward that was changed: its node, the path of its module, its argument, before and after."""

    node: str
    path: str
    site: str
    argument: str
    before: Any
    after: Any


def literal(*names: str) -> Callable[[Any], Any]:
    """Register a function from a call to its new arguments."""

    def register(function: Any) -> Any:
        for name in names:
            LITERALS[name] = function
        return function

    return register


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A smaller graph and what was changed.

    `indices`: tensor name -> axis -> the indices that stay. `changed`: numbers in the forward. Then the shapes
    before of all stored tensors.
    """

    graph: fx.GraphModule
    indices: dict[str, dict[int, torch.Tensor]]
    changed: tuple[Changed, ...]
    stored: dict[str, tuple[int, ...]]


def rewritten(graph: fx.GraphModule, found: Propagated, kept: np.ndarray) -> Rewritten:
    """Return a smaller copy of a graph module.

    Raises `Unsupported` naming the operation whose kept entries are no product of indices.
    """
    stays = Kept(kept, found.values)
    small = copied(graph)
    pairs = list(zip(graph.graph.nodes, small.graph.nodes, strict=True))
    twins = dict(pairs)
    changed: list[Changed] = []
    indices = cut_tensors_(
        small, {str(n.target): found.values[n.name] for n, _ in pairs if n.op == "get_attr"}, kept
    )
    for node, new in pairs:
        value = found.values[node.name]
        reached = [found.values[source.name] for source in node.all_input_nodes]
        if not any(stays.changes(part) for part in [value, *reached]):
            continue
        for part in value if isinstance(value, list) else [value]:
            if not is_product(part, kept):
                raise Unsupported(
                    "the units that stay are not the same along each axis",
                    where="torch.shrink",
                    got=call_of(node).site,
                )
        if node.name in found.constants and isinstance(value, Labelled):
            own = {axis: stays.along(value, axis) for axis in sorted(value.axes)}
            cut_before_users_(new, found.constants, own)
        elif node.op == "call_function" and name_of(node) in LITERALS:
            call = call_of(node)
            arguments = LITERALS[call.name](stays, call, new)
            with_arguments(
                new, {key: fx.map_arg(a, lambda n: twins.get(n, n)) for key, a in arguments.items()}
            )
            changed += _changes(call, arguments)
    small.graph.lint()
    small.recompile()
    read = {str(node.target) for node, _ in pairs if node.op == "get_attr"}
    tensors = {name: getattr(*owner_of(graph, name)) for name in sorted(read)}
    # The branches of `torch.cond` are stored modules.
    stored = {n: tuple(t.shape) for n, t in tensors.items() if isinstance(t, torch.Tensor)}
    return Rewritten(small, indices, tuple(changed), stored)


def _parts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _changes(call: Call, arguments: dict[str, Any]) -> list[Changed]:
    path = layer_of(call.node)
    found = []
    for name, after in arguments.items():
        before = call[name]
        pairs = [(before, after)]
        if isinstance(after, list):
            pairs += zip(before, after, strict=True)
        found += [
            Changed(call.node.name, path, call.site, name, old, other)
            for old, other in pairs
            if old != other and not any(isinstance(part, fx.Node) for part in _parts(old))
        ]
    return found


@torch.no_grad()
def cut_tensors_(
    module: nn.Module, values: dict[str, Any], kept: np.ndarray
) -> dict[str, dict[int, torch.Tensor]]:
    """Replace parameters and buffers by what stays of them; return name -> indices per axis."""
    done: dict[int, torch.Tensor] = {}
    indices: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in values.items():
        if not isinstance(value, Labelled) or not value.planes:
            continue
        chosen = {
            axis: torch.from_numpy(kept_along(value, axis, kept)) for axis in sorted(value.axes)
        }
        chosen = {axis: own for axis, own in chosen.items() if len(own) < value.shape[axis]}
        if not chosen:
            continue
        indices[name] = chosen
        owner, leaf = owner_of(module, name)
        old = getattr(owner, leaf)
        if id(old) not in done:
            done[id(old)] = _cut(old, chosen)
        setattr(owner, leaf, done[id(old)])
    return indices


def _cut(old: torch.Tensor, chosen: dict[int, torch.Tensor]) -> torch.Tensor:
    new = old.detach()
    for axis, own in chosen.items():
        new = new.index_select(axis, own.to(old.device))
    new = new.contiguous()
    return (
        nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    )


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a tensor, and the name it has there."""
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


@literal("view", "reshape", "_unsafe_view", "expand", "broadcast_to")
@literal(*FILLED, "rand", "randn")
def _shape(kept: Kept, call: Call, new: fx.Node) -> dict[str, Any]:
    name = "shape" if call.name == "reshape" else "size"
    value = kept.of(call.node)
    return {name: _sized(call_of(new)[name], value.shape, kept.sizes(value), new)}


def _sized(
    literals: Sequence[Any], before: Sequence[int], after: Sequence[int], new: fx.Node
) -> list[Any]:
    """Return sizes as literals, and those that are computed (batch times heads) times the share that stays."""
    sizes: list[Any] = []
    for literal_size, old, size in zip(literals, before, after, strict=True):
        if isinstance(literal_size, fx.Node) and size != old:
            with new.graph.inserting_before(new):
                times = new.graph.call_function(operator.mul, (literal_size, size))
                sizes.append(new.graph.call_function(operator.floordiv, (times, old)))
        else:
            number = isinstance(literal_size, int) and literal_size != -1
            sizes.append(size if number else literal_size)
    return sizes


@literal("unflatten")
def _unflatten(kept: Kept, call: Call, new: fx.Node) -> dict[str, Any]:
    value = kept.of(call.node)
    first = call["dim"] % len(kept.of(call["self"]).shape)
    axes = slice(first, first + len(call["sizes"]))
    sizes = _sized(call_of(new)["sizes"], value.shape[axes], kept.sizes(value)[axes], new)
    return {"sizes": sizes}


@literal("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def _split(kept: Kept, call: Call, new: fx.Node) -> dict[str, Any]:
    axis = call["dim"] % len(kept.of(call["self"]).shape)
    sizes = [kept.sizes(part)[axis] for part in kept.values[call.node.name]]
    before = call.arguments.get("split_size", call.arguments.get("split_sizes"))
    if isinstance(before, int) and len(set(sizes)) == 1:
        return {"split_size": sizes[0]}
    if isinstance(before, list):
        return {"split_sizes": sizes}
    new.target = torch.ops.aten.split_with_sizes.default
    new.args = (new.args[0], sizes, axis)
    new.kwargs = {}
    return {}


@literal("slice", "narrow")
def _slice(kept: Kept, call: Call, new: fx.Node) -> dict[str, Any]:
    value = kept.of(call["self"])
    axis = call["dim"] % len(value.shape)
    if axis not in value.axes:
        return {}
    size = value.shape[axis]
    start, end, step = _bounds(call, size)
    if step == 1:
        first, last = kept.before(value, axis, start), kept.before(value, axis, end)
        last = call["end"] if call.name == "slice" and end == size else last
        return (
            {"start": first, "end": last}
            if call.name == "slice"
            else {"start": first, "length": last - first}
        )
    _pick_(kept, value, axis, torch.arange(start, end, step), call, new)
    return {}


def _bounds(call: Call, size: int) -> tuple[int, int, int]:
    if call.name == "narrow":
        start = call["start"] % size
        return start, start + call["length"], 1
    return slice(call["start"], call["end"], call["step"]).indices(size)


@literal("select")
def _select(kept: Kept, call: Call, new: fx.Node) -> dict[str, Any]:
    value = kept.of(call["self"])
    axis = call["dim"] % len(value.shape)
    if axis not in value.axes:
        return {}
    return {"index": kept.before(value, axis, call["index"] % value.shape[axis])}


@literal("index_select")
def _index_select(kept: Kept, call: Call, new: fx.Node) -> dict[str, Any]:
    value = kept.of(call["self"])
    axis = call["dim"] % len(value.shape)
    places = _stored(call["index"])
    if axis in value.axes and places is not None:
        _pick_(kept, value, axis, places, call, new)
    return {}


@literal("index")
def _index(kept: Kept, call: Call, new: fx.Node) -> dict[str, Any]:
    value = kept.of(call["self"])
    chosen = [axis for axis, place in enumerate(call["indices"]) if place is not None]
    places = _stored(call["indices"][chosen[0]])
    if len(chosen) == 1 and chosen[0] in value.axes and places is not None and places.dim() == 1:
        _pick_(kept, value, chosen[0], places, call, new)
    return {}


def _stored(node: Any) -> torch.Tensor | None:
    while isinstance(node, fx.Node) and node.op == "call_function":
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def _pick_(
    kept: Kept, value: Labelled, axis: int, places: torch.Tensor, call: Call, new: fx.Node
) -> None:
    """Let a node pick the same entries at their new places."""
    stays = kept.along(value, axis)
    places = places % value.shape[axis]
    picked = places[torch.isin(places, stays)]
    ranks = torch.searchsorted(stays, picked)
    module: Any = new.graph.owning_module
    name = f"_{new.name}_places"
    module.register_buffer(name, ranks.to(next(iter(module.buffers()), ranks).device))
    with new.graph.inserting_before(new):
        stored = new.graph.get_attr(name)
    source = new.args[0]
    new.target = torch.ops.aten.index_select.default
    new.args = (source, axis, stored)
    new.kwargs = {}


@literal("constant_pad_nd", "pad")
def _pad(kept: Kept, call: Call, new: fx.Node) -> dict[str, Any]:
    value, out = kept.of(call["self"]), kept.of(call.node)
    widths = list(call["pad"])
    for place in range(len(widths) // 2):
        axis = len(out.shape) - 1 - place
        before = widths[2 * place]
        if axis not in out.axes or not any(widths[2 * place : 2 * place + 2]):
            continue
        stays = kept.along(out, axis)
        widths[2 * place] = int((stays < before).sum())
        widths[2 * place + 1] = int((stays >= before + value.shape[axis]).sum())
    return {"pad": widths}


@literal("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _groups(kept: Kept, call: Call, new: fx.Node) -> dict[str, Any]:
    if call["groups"] == 1:
        return {}
    weight = kept.of(call["weight"])
    value = kept.of(call["input"])
    channel = len(value.shape) - len(weight.shape) + 1
    sizes = kept.sizes(weight)
    each = sizes[1] if not call.name.startswith("conv_transpose") else None
    inputs = kept.sizes(value)[channel]
    if each is None:
        outputs = kept.sizes(kept.of(call.node))[channel]
        return {"groups": outputs // sizes[1]}
    return {"groups": inputs // each}


@literal("layer_norm", "rms_norm", "_fused_rms_norm")
def _normalized_shape(kept: Kept, call: Call, new: fx.Node) -> dict[str, Any]:
    sizes = kept.sizes(kept.of(call.node))
    return {"normalized_shape": list(sizes[len(sizes) - len(call["normalized_shape"]) :])}


@literal("group_norm")
def _num_groups(kept: Kept, call: Call, new: fx.Node) -> dict[str, Any]:
    value = kept.of(call.node)
    stays = kept.along(value, 1)
    each = value.shape[1] // call["num_groups"]
    return {"num_groups": len(torch.unique(stays // each))}


@literal("scaled_dot_product_attention")
def _scale(kept: Kept, call: Call, new: fx.Node) -> dict[str, Any]:
    if call["scale"] is not None:
        return {}
    return {"scale": kept.of(call["query"]).shape[-1] ** -0.5}
