"""Recurrent layers: the rows of a weight are gates times hidden units, and the hidden state feeds back."""

from __future__ import annotations

from typing import Any

import numpy as np

from karikomi.shrink.label_planes import Labelled, reshaped
from karikomi.torch.labelling.label_run import Call, LabelRun, Value, bare, rule

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
CELLS = {f"{name}_cell": gates for name, gates in GATES.items()}


@rule(*GATES)
def recurrent(run: LabelRun, call: Call) -> Value:
    """Join each hidden unit in all gates, in the columns that read the last state, and in the states.

    The states of all layers and directions are one tensor, so that all layers keep the same number of units.
    """
    if "data" in call.arguments or "batch_sizes" in call.arguments:
        return run.refuse(call, "packed sequences have no rule")
    states = call["hx"] if call.name == "lstm" else [call["hx"]]
    stored = [run.value(argument) for argument in call["params"]]
    directions = 2 if call["bidirectional"] else 1
    each = (4 if call["has_biases"] else 2) + _projected(call, stored)
    value = run.current(run.value(call["input"]), call.site)
    value = run.fix(value, call.site, [0, 1] if len(value.shape) == 3 else [0])
    hidden = None
    for layer in range(call["num_layers"]):
        outs = []
        for direction in range(directions):
            first = (layer * directions + direction) * each
            out, cell = _direction(run, call, value, stored[first : first + each])
            outs.append(out)
            hidden = _states(run, call, hidden, out, cell, states)
        value = _side_by_side(run, call, outs)
    found: Any = bare(call.node)
    outputs = [_last_axis(value, found[0])]
    assert hidden is not None  # noqa: S101  (there is a layer)
    outputs += [_last_axis(part, empty) for part, empty in zip(hidden, found[1:], strict=True)]
    return outputs


def _projected(call: Call, stored: list[Labelled]) -> int:
    """Return 1 if the hidden state is a projection of the cell, which is one more weight."""
    each = 4 if call["has_biases"] else 2
    directions = 2 if call["bidirectional"] else 1
    return int(len(stored) != each * directions * call["num_layers"])


def _direction(
    run: LabelRun, call: Call, value: Labelled, stored: list[Labelled]
) -> tuple[Labelled, Labelled]:
    """Return the labels of one hidden state and one cell."""
    biases = 2 if call["has_biases"] else 0
    inputs, recurrences = stored[:2]
    rows = _rows(run, call, stored[: 2 + biases], GATES[call.name])
    last = Labelled(value.shape[-1:], tuple(plane.flatten() for plane in value.planes))
    run.contract(last, "i", inputs, "oi", "o", call.site)
    projections = stored[2 + biases :]
    out = rows
    if projections:
        out = run.contract(rows, "u", projections[0], "pu", "p", call.site)
    run.contract(out, "h", recurrences, "oh", "o", call.site)
    return run.current(out, call.site), run.current(rows, call.site)


def _rows(run: LabelRun, call: Call, stored: list[Labelled], gates: int) -> Labelled:
    """Return the labels of hidden units, whose rows in all gates are joined."""

    def by_unit(part: Labelled) -> Labelled:
        new = (gates, part.shape[0] // gates, *part.shape[1:])
        found = Labelled(new, tuple(reshaped(plane, part.shape, new) for plane in part.planes))
        return run.fix(run.current(found, call.site), call.site, [0])

    return run.meet([_first(by_unit(part)) for part in stored], call.site)


@rule(*CELLS)
def cell(run: LabelRun, call: Call) -> Value:
    """One step of a recurrent layer: the state that goes out has the labels of the one that comes in."""
    states = call["hx"] if call.name == "lstm_cell" else [call["hx"]]
    names = [name for name in ("w_ih", "w_hh", "b_ih", "b_hh") if call[name] is not None]
    stored = [run.value(call[name]) for name in names]
    rows = _rows(run, call, stored, CELLS[call.name])
    value = run.current(run.value(call["input"]), call.site)
    value = run.fix(value, call.site, list(range(len(value.shape) - 1)))
    last = Labelled(value.shape[-1:], tuple(plane.flatten() for plane in value.planes))
    run.contract(last, "i", stored[0], "oi", "o", call.site)
    met = [run.meet([rows, _units(run, call, state)], call.site) for state in states]
    run.contract(met[0], "h", stored[1], "oh", "o", call.site)
    found: Any = bare(call.node)
    if call.name != "lstm_cell":
        return _last_axis(run.current(met[0], call.site), found)
    outputs = (run.current(part, call.site) for part in met)
    return [_last_axis(part, empty) for part, empty in zip(outputs, found, strict=True)]


def _first(value: Labelled) -> Labelled:
    """Return the labels along axis 1 of (gates, units, ...)."""
    planes = tuple(plane.flatten() for plane in value.planes if plane.shape[1] > 1)
    return Labelled(value.shape[1:2], planes)


def _states(
    run: LabelRun,
    call: Call,
    known: list[Labelled] | None,
    out: Labelled,
    cell: Labelled,
    states: list[Any],
) -> list[Labelled]:
    """Join the states that come in and go out with those of a layer."""
    parts = [out, cell] if call.name == "lstm" else [out]
    met = []
    for place, part in enumerate(parts):
        tensors = [part, _units(run, call, states[place])] + ([known[place]] if known else [])
        met.append(run.meet(tensors, call.site))
    return met


def _units(run: LabelRun, call: Call, state: Any) -> Labelled:
    """Return the labels of an initial state along its last axis."""
    value = run.current(run.value(state), call.site)
    value = run.fix(value, call.site, list(range(len(value.shape) - 1)))
    return Labelled(value.shape[-1:], tuple(plane.flatten() for plane in value.planes))


def _side_by_side(run: LabelRun, call: Call, outs: list[Labelled]) -> Labelled:
    if len(outs) == 1:
        return run.current(outs[0], call.site)
    parts = [out.planes[0] if out.planes else np.zeros(out.shape, np.int64) for out in outs]
    return run.current(Labelled((sum(len(p) for p in parts),), (np.concatenate(parts),)), call.site)


def _last_axis(value: Labelled, empty: Labelled) -> Labelled:
    ones = (1,) * (len(empty.shape) - 1)
    return Labelled(empty.shape, tuple(plane.reshape(*ones, -1) for plane in value.planes))
