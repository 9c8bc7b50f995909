"""The nodes of an ONNX graph that multiply and accumulate, and which of them have an integer kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from karikomi.torch.onnx_export.coded_weights import StoredCodes, code_, why_no_kernel
from karikomi.torch.onnx_export.graph_edits import GraphEdits, Node, Value, attribute

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(slots=True, eq=False)
class WeightedNode:
    """One node; `why_float`: why it cannot run in integers, None if it can. `macs`: of one run on the example."""

    node: Node
    name: str
    macs: int
    stored: StoredCodes | None
    why_float: str | None

    @property
    def kind(self) -> str:
        """The operator."""
        return self.node.op_type

    @property
    def unit_axis(self) -> int:
        """The axis of the output units in the weight as the node reads it."""
        return _KINDS[self.kind].unit_axis(self.node)

    @property
    def output_is_integer(self) -> bool:
        """Whether its integer kernel has integer outputs only."""
        return _KINDS[self.kind].output_is_integer


@dataclass(frozen=True, slots=True)
class _Kind:
    macs: Callable[[Node, Shapes], int]
    why_float: Callable[[GraphEdits, Node], str | None]
    unit_axis: Callable[[Node], int] = lambda node: 0
    output_is_integer: bool = False


def _conv_macs(node: Node, shapes: Shapes) -> int:
    weight = shapes[node.inputs[1].name]
    return math.prod(shapes[node.outputs[0].name]) * math.prod(weight[1:])


def _transposed_macs(node: Node, shapes: Shapes) -> int:
    return math.prod(shapes[node.inputs[0].name]) * math.prod(shapes[node.inputs[1].name][1:])


def _matrix_macs(node: Node, shapes: Shapes) -> int:
    inner = shapes[node.inputs[0].name]
    width = inner[0] if attribute(node, "transA", 0) else inner[-1]
    return math.prod(shapes[node.outputs[0].name]) * width


def _recurrent_macs(node: Node, shapes: Shapes) -> int:
    steps = math.prod(shapes[node.inputs[0].name][:2])
    return steps * sum(math.prod(shapes[node.inputs[place].name]) for place in (1, 2))


def _einsum_macs(node: Node, shapes: Shapes) -> int:
    terms = attribute(node, "equation").replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, value in zip(terms, node.inputs, strict=True):
        sizes.update(zip(term, shapes[value.name], strict=False))
    return math.prod(sizes.values())


def _matmul_why(edits: GraphEdits, node: Node) -> str | None:
    weight = edits.constant(node.inputs[1])
    return None if weight is None or weight.ndim == 2 else "its weight is no single matrix"


def _gemm_why(edits: GraphEdits, node: Node) -> str | None:
    if attribute(node, "transA", 0):
        return "its input is read transposed"
    if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
        return "its product is scaled"
    return _bias_why(edits, node)


def _bias_why(edits: GraphEdits, node: Node) -> str | None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return None
    array = edits.constant(bias)
    return None if array is not None and array.ndim == 1 else "its bias is computed"


def _no_kernel(edits: GraphEdits, node: Node) -> str | None:
    return f"onnxruntime has no integer kernel of {node.op_type} in this form"


_KINDS: dict[str, _Kind] = {
    "Conv": _Kind(_conv_macs, _bias_why, output_is_integer=True),
    "Gemm": _Kind(_matrix_macs, _gemm_why, lambda node: 1 - attribute(node, "transB", 0)),
    "MatMul": _Kind(_matrix_macs, _matmul_why, lambda node: 1),
    "ConvTranspose": _Kind(_transposed_macs, _no_kernel),
    "Einsum": _Kind(_einsum_macs, _no_kernel),
    **{kind: _Kind(_recurrent_macs, _no_kernel) for kind in ("LSTM", "GRU", "RNN")},
}


def weighted(edits: GraphEdits) -> list[Node]:
    """Return the nodes that multiply and accumulate, in order."""
    return edits.nodes(*_KINDS)


def shaped_values(edits: GraphEdits) -> list[str]:
    """Return the names of the computed values whose shapes `macs` needs."""
    values = [
        v for node in weighted(edits) for v in (*node.inputs, node.outputs[0]) if v is not None
    ]
    return list(dict.fromkeys(v.name for v in values if v.const_value is None and v.name))


def code_weights_(
    edits: GraphEdits,
    found: dict[Value, StoredCodes],
    names: Mapping[Value, str],
    bits: int,
    selected: Callable[[str], bool],
) -> None:
    """Give the constant weights of nodes with an integer kernel codes that it takes, where they have none."""
    for node in weighted(edits):
        weight, kind = node.inputs[1], _KINDS[node.op_type]
        name = names.get(weight, weight.name)
        if selected(name) and kind.why_float(edits, node) is None:
            code_(edits, found, weight, name=name, bits=bits, axis=kind.unit_axis(node))


def weighted_nodes(
    edits: GraphEdits,
    found: Mapping[Value, StoredCodes],
    names: Mapping[Value, str],
    shapes: Shapes,
    selected: Callable[[str], bool],
) -> list[WeightedNode]:
    """Return each node that multiplies, with its work and why it has to run in float.

    `names`: initializer -> name of the parameter with its values. `shapes`: of computed values on the example.
    `selected`: by the name of a weight.
    """
    constants = {v.name: v.const_value.shape.numpy() for v in edits.graph.initializers.values()}
    known = {**constants, **shapes}
    made = []
    for node in weighted(edits):
        weight = node.inputs[1]
        stored = found.get(weight)
        own = weight.name if edits.constant(weight) is not None else node.outputs[0].name
        name = stored.name if stored else names.get(weight, own)
        item = WeightedNode(node, name, _KINDS[node.op_type].macs(node, known), stored, None)
        item.why_float = _why_float(edits, item, selected)
        made.append(item)
    return made


def _why_float(
    edits: GraphEdits, item: WeightedNode, selected: Callable[[str], bool]
) -> str | None:
    node = item.node
    constants = [edits.constant(value) is not None for value in node.inputs[:2]]
    if constants == [False, False]:
        return "a product of two activations"
    if not constants[1]:
        return "its weight is the first factor"
    if not selected(item.name):
        return "not selected"
    kernel = _KINDS[item.kind].why_float(edits, node)
    if kernel or item.stored is None:
        return kernel or "its weight has no codes"
    return why_no_kernel(item.stored, item.unit_axis)


def with_bias_codes(
    stored: StoredCodes, axis: int, bias: np.ndarray | None, step: float
) -> tuple[StoredCodes, np.ndarray | None, np.ndarray]:
    """Return codes with scales that a bias can share, the bias in units of ``step * scale``, and these units.

    A unit whose codes are all zero decodes to zeros with any scale: it gets the one that its bias needs. The bias
    is None if it does not fit in 32 bits.
    """
    scale = np.asarray(stored.scale, np.float32)
    if bias is None:
        return stored, np.zeros(0, np.int32), scale * np.float32(step)
    others = tuple(place for place in range(stored.codes.ndim) if place != axis)
    scale = np.broadcast_to(scale, bias.shape).copy()
    empty = ~np.any(stored.codes, axis=others)
    wanted = np.maximum(np.abs(bias) / (step * 2.0**24), np.finfo(np.float32).tiny)
    scale[empty] = wanted[empty]
    units = (scale * np.float32(step)).astype(np.float32)
    codes = np.rint(bias.astype(np.float64) / units.astype(np.float64))
    fits = bool(np.all(np.abs(codes) < 2**31 - 1))
    if not empty.any():
        return stored, codes.astype(np.int32) if fits else None, units
    return replace(stored, chosen=scale, axis=axis), codes.astype(np.int32) if fits else None, units
