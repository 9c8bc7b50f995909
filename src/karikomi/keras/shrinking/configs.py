"""How configurations of layers and operations change with the units that stay: one function per type."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from karikomi.errors import Unsupported
from karikomi.keras.internals import graph_of, kernel_of
from karikomi.keras.labelling.attention_layers import parts_of
from karikomi.keras.labelling.contractions import channel_axis
from karikomi.keras.labelling.kept import WHERE, KeptWeights
from karikomi.keras.labelling.label_run import Call, Value, kind_of
from karikomi.keras.labelling.movement import by_axis, widths_of
from karikomi.shrink.label_planes import Labelled

Config = dict[str, Any]
Arguments = tuple[Any, ...]
Change = Callable[["Changes", Call, Value], Config]
CHANGES: dict[str, Change] = {}


@dataclass(frozen=True, slots=True)
class Changes:
    """What has to change, by id: entries of configurations, arguments after the first, factors of weights.

    `inputs`: the shapes of the inputs of models inside of the model.
    """

    kept: KeptWeights
    configs: dict[int, Config] = field(default_factory=dict)
    arguments: dict[int, Arguments] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)
    inputs: dict[int, list[tuple[int | None, ...]]] = field(default_factory=dict)


def changes(kept: KeptWeights) -> Changes:
    """Return all changes; raises `Unsupported` for a layer of which two uses would need different ones."""
    new = Changes(kept)
    for call, found in kept.found.calls:
        operation, graph = call.operation, graph_of(call.operation)
        change = CHANGES.get(kind_of(operation))
        same = True
        if graph is not None:
            shapes = _input_shapes(kept, call, graph)
            same = new.inputs.setdefault(id(operation), shapes) == shapes
        elif change is not None and _reached(kept, call, found):
            config = change(new, call, found)
            same = new.configs.setdefault(id(operation), config) == config
        if not same:
            raise Unsupported(
                "a layer that is used twice would have to be two layers",
                where=f"{WHERE}: {call.site}",
                hint="make two layers of it, or exclude= what reaches it",
            )
    return new


def _input_shapes(kept: KeptWeights, call: Call, graph: Any) -> list[tuple[int | None, ...]]:
    """Return the shapes of the inputs of a model that is used as a layer; an unknown size stays unknown."""
    return [
        tuple(
            None if before is None else size
            for before, size in zip(tensor.shape, kept.sizes(value), strict=True)
        )
        for tensor, value in zip(graph.inputs, call.values, strict=True)
    ]


def _reached(kept: KeptWeights, call: Call, found: Value) -> bool:
    """Return whether anything goes of what a call is given, has or returns."""
    weights = getattr(call.operation, "weights", [])
    return (
        kept.changes(found)
        or any(kept.changes(value) for value in call.values)
        or any(kept.changes(kept.value_of(variable)) for variable in weights)
    )


def change(*names: str) -> Callable[[Change], Change]:
    """Register a function from a call to entries of the configuration."""

    def register(function: Change) -> Change:
        for name in names:
            CHANGES[name] = function
        return function

    return register


@change("layers.Dense")
def _units(new: Changes, call: Call, found: Value) -> Config:
    return {"units": new.kept.of(kernel_of(call.operation))[-1]}


@change("layers.Conv1D", "layers.Conv2D", "layers.Conv3D")
def _filters(new: Changes, call: Call, found: Value) -> Config:
    layer = call.operation
    *_, inputs, outputs = new.kept.of(kernel_of(layer))
    channels = new.kept.sizes(call.values[0])[channel_axis(layer)]
    return {"filters": outputs, "groups": channels // inputs}


@change("layers.SeparableConv1D", "layers.SeparableConv2D")
def _separable(new: Changes, call: Call, found: Value) -> Config:
    return {"filters": new.kept.of(call.operation.pointwise_kernel)[-1]}


@change("layers.Conv1DTranspose", "layers.Conv2DTranspose", "layers.Conv3DTranspose")
def _transposed(new: Changes, call: Call, found: Value) -> Config:
    return {"filters": new.kept.of(kernel_of(call.operation))[-2]}


@change("layers.EinsumDense")
def _einsum_dense(new: Changes, call: Call, found: Value) -> Config:
    shape = call.operation.get_config()["output_shape"]
    before = [shape] if isinstance(shape, int) else list(shape)
    assert isinstance(found, Labelled)  # noqa: S101
    sizes = new.kept.sizes(found)[len(found.shape) - len(before) :]
    return {"output_shape": _sized(before, sizes, found.shape[len(found.shape) - len(before) :])}


def _sized(literals: Any, sizes: Any, old: Any) -> tuple[Any, ...]:
    """Return literals with those replaced whose size changes; an unknown size stays unknown."""
    return tuple(
        size if size != before and literal != -1 else literal
        for literal, size, before in zip(literals, sizes, old, strict=True)
    )


@change("layers.Embedding")
def _embedding(new: Changes, call: Call, found: Value) -> Config:
    return {"output_dim": new.kept.of(call.operation.embeddings)[-1]}


@change("layers.LayerScale")
def _layer_scale(new: Changes, call: Call, found: Value) -> Config:
    return {"projection_dim": new.kept.of(call.operation.gamma)[0]}


@change("layers.GroupNormalization")
def _group_normalization(new: Changes, call: Call, found: Value) -> Config:
    layer = call.operation
    assert isinstance(found, Labelled)  # noqa: S101
    axis = layer.axis % len(found.shape)
    each = found.shape[axis] // layer.groups
    return {"groups": len(np.unique(new.kept.indices(found, axis) // each))}


@change("layers.LSTM", "layers.GRU", "layers.SimpleRNN")
def _recurrent(new: Changes, call: Call, found: Value) -> Config:
    return {"units": _hidden(new, call.operation.cell)}


def _hidden(new: Changes, cell: Any) -> int:
    return new.kept.of(cell.recurrent_kernel)[0]


@change("layers.RNN")
def _cell(new: Changes, call: Call, found: Value) -> Config:
    cell = call.operation.cell
    return {"cell": _nested(cell, {"units": _hidden(new, cell)})}


@change("layers.Bidirectional")
def _bidirectional(new: Changes, call: Call, found: Value) -> Config:
    layer = call.operation
    both = {"layer": layer.forward_layer, "backward_layer": layer.backward_layer}
    return {name: _nested(each, {"units": _hidden(new, each.cell)}) for name, each in both.items()}


@change("layers.TimeDistributed")
def _time_distributed(new: Changes, call: Call, found: Value) -> Config:
    layer = call.operation.layer
    return {"layer": _nested(layer, new.configs.get(id(layer), {}))}


def _nested(layer: Any, config: Config) -> Config:
    """Return a layer inside of a configuration."""
    whole: Any = keras.saving.serialize_keras_object(layer)
    return {**whole, "config": {**whole["config"], **config}}


@change("layers.MultiHeadAttention")
def _multi_head_attention(new: Changes, call: Call, found: Value) -> Config:
    layer = call.operation
    _, heads, width = new.kept.of(kernel_of(layer.query_dense))
    out = new.kept.of(kernel_of(layer.output_dense))[-1]
    same = new.kept.sizes(call.argument(0, "query"))[-1] == out
    _keep_scale(new, layer.query_dense, layer.key_dim, width)
    return {
        "num_heads": heads,
        "key_dim": width,
        "value_dim": new.kept.of(kernel_of(layer.value_dense))[-1],
        "output_shape": layer.get_config()["output_shape"] if same else (out,),
    }


@change("layers.GroupedQueryAttention")
def _grouped_query_attention(new: Changes, call: Call, found: Value) -> Config:
    layer, parts = call.operation, parts_of(call.operation)
    _, heads, width = new.kept.of(kernel_of(parts["query"]))
    _keep_scale(new, parts["query"], layer.head_dim, width)
    return {
        "head_dim": width,
        "num_query_heads": heads,
        "num_key_value_heads": new.kept.of(kernel_of(parts["key"]))[1],
    }


def _keep_scale(new: Changes, query: Any, before: int, after: int) -> None:
    # The layer divides scores by the root of its width, which is another one now.
    for variable in (kernel_of(query), query.bias):
        if variable is not None and before != after:
            new.scales[id(variable)] = math.sqrt(after / before)


@change("layers.Reshape")
def _target_shape(new: Changes, call: Call, found: Value) -> Config:
    assert isinstance(found, Labelled)  # noqa: S101
    sizes = new.kept.sizes(found)[1:]
    return {"target_shape": _sized(call.operation.target_shape, sizes, found.shape[1:])}


@change("ops.Reshape")
def _newshape(new: Changes, call: Call, found: Value) -> Config:
    assert isinstance(found, Labelled)  # noqa: S101
    sizes = new.kept.sizes(found)
    return {"newshape": _sized(call.operation.newshape, sizes, found.shape)}


@change("ops.Split")
def _split(new: Changes, call: Call, found: Value) -> Config:
    parts = found if isinstance(found, list) else [found]
    axis = call.operation.axis % len(call.shape)
    sizes = [new.kept.sizes(part)[axis] for part in parts]
    even = isinstance(call.operation.indices_or_sections, int) and len(set(sizes)) == 1
    return {"indices_or_sections": len(sizes) if even else tuple(np.cumsum(sizes[:-1]).tolist())}


@change("ops.Pad")
def _pad(new: Changes, call: Call, found: Value) -> Config:
    assert isinstance(found, Labelled)  # noqa: S101
    value, rank = call.values[0], len(found.shape)
    widths = [(0, 0)] * rank
    for axis, (before, after) in widths_of(call.operation, rank).items():
        stays = new.kept.indices(found, axis)
        past = before + value.shape[axis]
        unknown = found.shape[axis] != past + after
        new_pair = (int((stays < before).sum()), int((stays >= past).sum()))
        widths[axis] = (before, after) if unknown else new_pair
    return {"pad_width": tuple(widths)}


@change("ops.GetItem")
def _get_item(new: Changes, call: Call, found: Value) -> Config:
    value, key = call.values[0], call.argument(1, "key")
    parts = list(key) if isinstance(key, tuple | list) else [key]
    places = [place for place, part in enumerate(parts) if isinstance(part, int | slice)]
    for place, (axis, part) in zip(places, by_axis(key, len(value.shape)), strict=True):
        if axis not in value.axes:
            continue
        size = value.shape[axis]
        if isinstance(part, int):
            parts[place] = new.kept.before(value, axis, part % size)
        else:
            start, stop, _ = part.indices(size)
            first, last = (new.kept.before(value, axis, end) for end in (start, stop))
            parts[place] = slice(first, last, part.step)
    new.arguments[id(call.operation)] = (
        tuple(parts) if isinstance(key, tuple | list) else parts[0],
    )
    return {}
