"""Operators that read or write places of an axis by a tensor of indices: that axis stays, all others pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from karikomi.shrink.label_planes import Labelled, evened
from karikomi.torch.labelling.label_run import Call, LabelRun, Value, rule, shape_of
from karikomi.torch.labelling.movement import moved


def _beside(run: LabelRun, call: Call, argument: Any, axis: int) -> Labelled:
    """Return an argument with size 1 along an axis, which stays."""
    value = run.fix(run.current(run.value(argument), call.site), call.site, [axis])
    shape = tuple(1 if place == axis else size for place, size in enumerate(value.shape))
    return Labelled(shape, value.planes)


def _in_line(run: LabelRun, call: Call, arguments: list[Any]) -> Labelled:
    """Join arguments along all axes but that of the operator; an axis that is read in part stays."""
    rank = len(run.value(arguments[0]).shape)
    axis = call["dim"] % max(rank, 1)
    values = [_beside(run, call, argument, axis) for argument in arguments]
    sizes = [{value.shape[place] for value in values} for place in range(rank)]
    partly = [place for place, found in enumerate(sizes) if len(found) > 1]
    values = [run.fix(value, call.site, partly) for value in values]
    values = [
        Labelled(tuple(1 if p in partly else s for p, s in enumerate(value.shape)), value.planes)
        for value in values
    ]
    return run.meet(values, call.site)


@rule("gather", "take_along_dim")
def gather(run: LabelRun, call: Call) -> Value:
    """Read at places, which have the labels of what is read along the other axes."""
    index = call.arguments.get("index", call.arguments.get("indices"))
    if call["dim"] is None:
        return run.refuse(call, "no axis is named")
    met = _in_line(run, call, [call["self"], index])
    return Labelled(shape_of(call.node.meta["val"]), met.planes)


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(run: LabelRun, call: Call) -> Value:
    """Write at places, which have the labels of what is written along the other axes."""
    written = call.arguments.get("src", call.arguments.get("value"))
    sources = [call["self"], call["index"]]
    sources += [written] if isinstance(written, fx.Node) and run.value(written).shape else []
    met = _in_line(run, call, sources)
    return Labelled(shape_of(call.node.meta["val"]), met.planes)


@rule("index_add", "index_copy", "index_reduce")
def rows_written(run: LabelRun, call: Call) -> Value:
    """Write whole rows."""
    met = _in_line(run, call, [call["self"], call["source"]])
    return Labelled(shape_of(call.node.meta["val"]), met.planes)


@rule("index_fill")
def rows_filled(run: LabelRun, call: Call) -> Value:
    """Fill whole rows with a number."""
    return Labelled(shape_of(call.node.meta["val"]), _in_line(run, call, [call["self"]]).planes)


@rule("index_put")
def index_put(run: LabelRun, call: Call) -> Value:
    """Write at places along some axes, which stay; what is written there has the labels of the others."""
    picks: list[torch.Tensor | None] = []
    for place in call["indices"]:
        known = None if place is None else place.meta["val"]
        if known is not None and known.dtype is torch.bool:
            # A mask picks places along as many axes as it has; how many depends on the data.
            picks += [torch.zeros(1, dtype=torch.int64)] * known.dim()
        else:
            picks.append(None if known is None else torch.zeros(shape_of(known), dtype=torch.int64))
    value = run.current(run.value(call["self"]), call.site)
    value = run.fix(value, call.site, [a for a, pick in enumerate(picks) if pick is not None])

    def picked(plane: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.index.Tensor(plane, picks)

    shape = picked(torch.zeros((), dtype=torch.int8).expand(value.shape)).shape
    planes = tuple(moved(plane, value.shape, picked) for plane in value.planes)
    planes = tuple(evened(plane) for plane in planes)
    run.meet([Labelled(tuple(shape), planes), run.value(call["values"])], call.site)
    return run.current(value, call.site)
