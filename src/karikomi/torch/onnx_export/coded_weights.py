"""Codes in place of the float weights of an ONNX graph: the integers and scales that the packed file has."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from karikomi.quantize import (
    Codebook,
    Coded,
    OutputUnits,
    UniformGrid,
    UniformQuantizer,
    uniform,
)
from karikomi.quantize.grids import split_units
from karikomi.quantize.nearest import narrowed
from karikomi.torch.onnx_export.graph_edits import GraphEdits, Node, Value, attribute


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """The codes of one initializer, in its shape; `axis`: of the scales there, None for one scale in all.

    `chosen`: other scales for units whose codes are all zero.
    """

    name: str
    coded: Coded
    codes: np.ndarray
    axis: int | None
    chosen: np.ndarray | None = None

    @property
    def scale(self) -> np.ndarray | None:
        """The scales of a uniform grid without groups, None for other grids."""
        grid = self.coded.grid
        if not isinstance(grid, UniformGrid) or grid.groups != 1:
            return None
        return grid.scale if self.chosen is None else self.chosen

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.coded.grid.bits


def fold_transposes_(edits: GraphEdits) -> None:
    """Store initializers that the graph transposes as transposed ones."""
    for node in edits.nodes("Transpose"):
        array = edits.constant(node.inputs[0])
        if array is None or node.outputs[0].is_graph_output():
            continue
        order = attribute(node, "perm", tuple(reversed(range(array.ndim))))
        moved = edits.stored(f"{node.inputs[0].name}_transposed", array.transpose(order))
        node.outputs[0].replace_all_uses_with(moved)
        edits.graph.remove(node, safe=True)


def found_codes(
    edits: GraphEdits, coded: Mapping[str, Coded]
) -> tuple[dict[Value, StoredCodes], dict[str, str]]:
    """Return initializer -> its codes, and the name of each code that no initializer has -> why.

    An initializer is recognised by its values, which are those that the codes decode to, as they lie or as the
    transposed matrix: so exporters may rename and transpose weights.
    """
    by_values: dict[str, list[StoredCodes]] = {}
    for name, tensor in coded.items():
        for stored in _ways(name, tensor):
            values = tensor.decode()
            moved = values.T if stored.codes.shape != values.shape or _turned(stored) else values
            by_values.setdefault(_digest(moved), []).append(stored)
    found: dict[Value, StoredCodes] = {}
    for value in list(edits.graph.initializers.values()):
        array = edits.constant(value)
        if array is None or array.dtype != np.float32:
            continue
        for stored in by_values.get(_digest(array), []):
            if stored.codes.shape == array.shape:
                found[value] = stored
    names = {stored.name for stored in found.values()}
    missing = {
        name: "the graph has no constant of these values: the exporter merged or split the weight"
        for name in coded
        if name not in names
    }
    return found, missing


def _ways(name: str, coded: Coded) -> list[StoredCodes]:
    axis = getattr(coded.grid, "axis", None)
    ways = [StoredCodes(name, coded, coded.codes, axis)]
    if coded.codes.ndim == 2:
        other = None if axis is None else 1 - axis
        ways.append(replace(ways[0], codes=coded.codes.T, axis=other))
    return ways


def _turned(stored: StoredCodes) -> bool:
    return stored.codes is not stored.coded.codes


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, np.float32).tobytes()).hexdigest()


def parameter_names(edits: GraphEdits, parameters: Mapping[str, Any]) -> dict[Value, str]:
    """Return initializer -> name of the parameter with its values, as they lie or as the transposed matrix."""
    names: dict[str, str] = {}
    for name, parameter in parameters.items():
        array = parameter.detach().cpu().float().numpy()
        for values in (array, array.T)[: 1 + (array.ndim == 2)]:
            names.setdefault(_digest(values), name)
    found = {}
    for value in edits.graph.initializers.values():
        array = edits.constant(value)
        if array is not None and array.dtype == np.float32 and _digest(array) in names:
            found[value] = names[_digest(array)]
    return found


def code_(
    edits: GraphEdits,
    found: dict[Value, StoredCodes],
    value: Value,
    *,
    name: str,
    bits: int,
    axis: int,
) -> None:
    """Give a constant codes that integer kernels take, one scale per index of `axis`, where it has none."""
    array, stored = edits.constant(value), found.get(value)
    if array is None or array.dtype != np.float32 or not array.size:
        return
    if stored is None:
        coded = uniform(array, bits=bits, axis=axis, name=name)
    elif why_no_kernel(stored, axis) is None:
        return
    elif stored.scale is None:
        coded = UniformQuantizer(range="mse").quantize(array, bits, units=OutputUnits(axis))
    else:
        grid = UniformGrid(stored.scale, stored.axis, stored.bits)
        coded = narrowed(Coded(stored.codes, grid), bits=bits, axis=axis)
    found[value] = StoredCodes(name, coded, coded.codes, axis)


def why_no_kernel(stored: StoredCodes, axis: int) -> str | None:
    """Return why no integer kernel takes codes as weights whose output units lie along `axis`, None if they do."""
    if stored.scale is None:
        return f"its codes have no scale per unit ({type(stored.coded.grid).__name__})"
    if stored.bits > 8:
        return f"its codes have {stored.bits} bits"
    if stored.axis not in (None, axis):
        return "its scales are not those of output units"
    if stored.codes.ndim < 2 or not stored.codes.size:
        return "its weight is empty or a vector"
    return None


def decode_in_graph_(edits: GraphEdits, found: Mapping[Value, StoredCodes]) -> None:
    """Replace float initializers by codes and the nodes that decode them, one chain per reader.

    Vectors stay as the floats that their codes decode to: a node that decodes one takes longer than what reads it.
    """
    for value, stored in found.items():
        if why_decoded(stored):
            continue
        for node, place in edits.uses(value):
            if node.op_type == "Gather" and place == 0 and attribute(node, "axis", 0) == 0:
                _gathered_(edits, node, stored)
            else:
                node.replace_input_with(place, decoded(edits, node, stored))


def why_decoded(stored: StoredCodes) -> str | None:
    """Return why codes are stored as the floats that they decode to, None if they are stored as they are."""
    if stored.codes.ndim < 2:
        return "a vector: stored as the floats that its codes decode to"
    if _decoded.dispatch(type(stored.coded.grid)) is _decoded.dispatch(object):
        kind = type(stored.coded.grid).__name__
        return f"ONNX has no form of its {kind}: stored as the floats that its codes decode to"
    return None


def decoded(edits: GraphEdits, node: Node, stored: StoredCodes) -> Value:
    """Return the value of float weights that new nodes before `node` decode."""
    return _decoded(stored.coded.grid, edits, node, stored)


@functools.singledispatch
def _decoded(grid: Any, edits: GraphEdits, node: Node, stored: StoredCodes) -> Value:
    """Return the value that a grid gives codes in the graph."""
    raise NotImplementedError(f"{type(grid).__name__}: see `why_decoded`")


@_decoded.register
def _uniform(grid: UniformGrid, edits: GraphEdits, node: Node, stored: StoredCodes) -> Value:
    name = stored.name
    codes = edits.stored(f"{name}_codes", stored.codes)
    if grid.groups > 1:
        # DequantizeLinear has scales along one axis; these lie along two.
        shape = stored.codes.shape
        split, units = split_units(shape, grid.axis, grid.groups)
        table = np.broadcast_to(grid.scale.reshape(units), (*split[:2], *units[2:]))
        scale = edits.stored(f"{name}_scale", table.reshape(shape[0], *units[2:]))
        wide = edits.before(node, "Cast", codes, name=f"{name}_wide", to=1)
        return edits.before(node, "Mul", wide, scale, name=f"{name}_decoded")
    scale = grid.scale if stored.chosen is None else stored.chosen
    scale = scale if stored.axis is not None else scale.reshape(())
    zero = np.zeros(scale.shape, stored.codes.dtype)
    given = (
        codes,
        edits.stored(f"{name}_scale", scale),
        edits.stored(f"{name}_zero_point", zero),
    )
    axis = {} if stored.axis is None else {"axis": stored.axis}
    return edits.before(node, "DequantizeLinear", *given, name=f"{name}_decoded", **axis)


@_decoded.register
def _codebook(grid: Codebook, edits: GraphEdits, node: Node, stored: StoredCodes) -> Value:
    codes = edits.stored(f"{stored.name}_codes", stored.codes)
    # Indices have 32 bits at least; an engine folds both nodes when it loads the file.
    places = edits.before(node, "Cast", codes, name=f"{stored.name}_places", to=6)
    values = edits.stored(f"{stored.name}_values", grid.values)
    return edits.before(node, "Gather", values, places, name=f"{stored.name}_decoded", axis=0)


def _gathered_(edits: GraphEdits, node: Node, stored: StoredCodes) -> None:
    """Look up codes instead of weights, and decode the rows that were found only."""
    scale, name = stored.scale, stored.name
    if scale is None or stored.axis not in (None, 0):
        node.replace_input_with(0, decoded(edits, node, stored))
        return
    ids, output = node.inputs[1], node.outputs[0]
    codes = edits.stored(f"{name}_codes", stored.codes)
    rows = edits.before(node, "Gather", codes, ids, name=f"{name}_rows", axis=0)
    wide = edits.before(node, "Cast", rows, name=f"{name}_wide", to=1)
    if stored.axis is None:
        factor = edits.stored(f"{name}_scale", scale.reshape(()))
    else:
        table = edits.stored(f"{name}_scale", scale.reshape(-1, *[1] * (stored.codes.ndim - 1)))
        factor = edits.before(node, "Gather", table, ids, name=f"{name}_factors", axis=0)
    product = edits.before(node, "Mul", wide, factor, name=f"{name}_found")
    output.replace_all_uses_with(product, replace_graph_outputs=True)
    edits.graph.remove(node, safe=True)
