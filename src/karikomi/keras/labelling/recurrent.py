"""Recurrent layers: the columns of a kernel are gates times hidden units, and the hidden state feeds back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from karikomi.keras.internals import graph_of
from karikomi.keras.labelling.label_run import (
    Call,
    LabelRun,
    Value,
    computes_weights,
    kind_of,
    placed,
    rule,
)
from karikomi.shrink.label_planes import Labelled, Shape, reshaped

GATES = {"layers.LSTMCell": 4, "layers.GRUCell": 3, "layers.SimpleRNNCell": 1}


@rule("layers.Embedding")
def embedding(run: LabelRun, call: Call) -> Value:
    """Pick rows, which stay; the columns pass."""
    table = run.variable(call.operation.embeddings)
    return placed(run.vector(table, -1, call.site), call.shape, -1)


@rule("layers.LSTM", "layers.GRU", "layers.SimpleRNN", "layers.RNN")
def recurrent(run: LabelRun, call: Call) -> Value:
    """Join each hidden unit in all gates, in the rows that read the last state, and in the states."""
    why = _unfollowed(call.operation)
    if why:
        return run.refuse(call, why)
    value = run.vector(call.values[0], -1, call.site)
    hidden = _units(run, call, value, call.operation.cell, call.values[1:])
    return _out(call, hidden)


def _unfollowed(layer: Any) -> str:
    if kind_of(layer.cell) not in GATES:
        return "its cell has no rule"
    if computes_weights(layer.cell):
        return "its weights are computed from others (quantized, or with LoRA)"
    return "its state is kept between batches" if layer.stateful else ""


def _out(call: Call, hidden: Labelled) -> Value:
    found = [placed(hidden, shape, -1) for shape in call.shapes]
    return found if len(found) > 1 else found[0]


def _units(
    run: LabelRun, call: Call, value: Labelled, cell: Any, states: list[Labelled]
) -> Labelled:
    """Return the labels of the hidden units of a cell."""
    gates = GATES[kind_of(cell)]

    def by_unit(variable: Any) -> Labelled:
        own = run.variable(variable)
        shape = (*own.shape[:-1], gates, own.shape[-1] // gates)
        split = Labelled(shape, tuple(reshaped(plane, own.shape, shape) for plane in own.planes))
        return run.fix(run.current(split, call.site), call.site, [len(shape) - 2])

    inputs, recurrences = by_unit(cell.kernel), by_unit(cell.recurrent_kernel)
    columns = [_last(part) for part in (inputs, recurrences)]
    if cell.bias is not None:
        bias = by_unit(cell.bias)
        bias = run.fix(bias, call.site, range(len(bias.shape) - 1))
        columns.append(_last(bias))
    columns += [run.vector(state, -1, call.site) for state in states]
    hidden = run.meet(columns, call.site)
    run.contract(value, "i", inputs, "igu", "gu", call.site)
    run.contract(hidden, "h", recurrences, "hgu", "gu", call.site)
    return run.current(hidden, call.site)


def _last(value: Labelled) -> Labelled:
    """Return the labels along the last axis alone."""
    planes = tuple(plane.reshape(-1) for plane in value.planes if plane.shape[-1] > 1)
    return Labelled(value.shape[-1:], planes)


@rule("layers.Bidirectional")
def bidirectional(run: LabelRun, call: Call) -> Value:
    """Put both directions side by side, or join them, as the layer merges them."""
    layer = call.operation
    both = (layer.forward_layer, layer.backward_layer)
    why = "; ".join(_unfollowed(each) for each in both if _unfollowed(each))
    if why or len(call.values) > 1:
        return run.refuse(call, why or "initial states of both directions have no rule")
    value = run.vector(call.values[0], -1, call.site)
    hidden = [_units(run, call, value, each.cell, []) for each in both]
    if layer.merge_mode == "concat":
        merged = [run.side_by_side(hidden, 0, call.site)]
    elif layer.merge_mode is None:
        merged = hidden
    else:
        merged = [run.meet(hidden, call.site)]
    rest = len(call.shapes) - len(merged)
    each = [part for part in hidden for _ in range(rest // 2)]
    found = [
        placed(part, shape, -1) for part, shape in zip([*merged, *each], call.shapes, strict=True)
    ]
    return found if len(found) > 1 else found[0]


@rule("layers.TimeDistributed")
def time_distributed(run: LabelRun, call: Call) -> Value:
    """Run the layer inside on each step."""
    value = run.fix(run.current(call.values[0], call.site), call.site, [1])
    if len(call.values) > 1 or graph_of(call.operation.layer) is not None:
        return run.refuse(call)

    def without_step(shape: Shape) -> Shape:
        return (*shape[:1], *shape[2:])

    inner = Labelled(
        without_step(value.shape),
        tuple(plane.reshape(without_step(plane.shape)) for plane in value.planes),
    )
    step = replace(
        call,
        operation=call.operation.layer,
        args=(inner,),
        kwargs={},
        shapes=tuple(without_step(shape) for shape in call.shapes),
        known=tuple(min(axis, 1) if axis < 2 else axis - 1 for axis in call.known),
    )
    found = run.follow(step)
    parts = found if isinstance(found, list) else [found]
    whole = [
        Labelled(shape, tuple(np.expand_dims(plane, 1) for plane in part.planes))
        for part, shape in zip(parts, call.shapes, strict=True)
    ]
    return whole if len(whole) > 1 else whole[0]
