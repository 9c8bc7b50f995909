"""Normalisations: labels pass, and what is measured over entries that can go is noted as a statistic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from karikomi.keras.labelling.label_run import Call, LabelRun, Value, placed, rule
from karikomi.shrink.label_planes import Labelled, reshaped


@rule("layers.BatchNormalization")
def batch_normalization(run: LabelRun, call: Call) -> Value:
    """Join scale, shift and running statistics with the axis."""
    layer, value = call.operation, call.values[0]
    stored = (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
    return run.meet([value, *_stored(run, value, stored, [layer.axis])], call.site)


@rule("layers.LayerNormalization", "layers.RMSNormalization", "layers.UnitNormalization")
def layer_normalization(run: LabelRun, call: Call) -> Value:
    """Join scale and shift with the axes."""
    value = call.values[0]
    axes = axes_of(call.operation)
    stored = [getattr(call.operation, name, None) for name in ("gamma", "beta", "scale")]
    stored = [variable for variable in stored if hasattr(variable, "shape")]
    met = run.meet([value, *_stored(run, value, stored, axes)], call.site)
    return run.over_statistics(call, met, axes)


@rule("layers.GroupNormalization")
def group_normalization(run: LabelRun, call: Call) -> Value:
    """Join scale and shift with the axis; the groups stay equally large."""
    layer, value = call.operation, call.values[0]
    met = run.meet(
        [value, *_stored(run, value, (layer.gamma, layer.beta), [layer.axis])], call.site
    )
    vector = run.vector(met, layer.axis, call.site)
    split = (layer.groups, vector.shape[0] // layer.groups)
    grouped = Labelled(split, tuple(reshaped(p, vector.shape, split) for p in vector.planes))
    run.over_statistics(call, run.by_one_axis(grouped, call.site), [1])
    return run.current(met, call.site)


@rule("layers.Normalization")
def normalization(run: LabelRun, call: Call) -> Value:
    """Keep its axes, of which it has seen data."""
    axes = [axis for axis in axes_of(call.operation) if axis is not None]
    return run.fix(run.current(call.values[0], call.site), call.site, axes)


def axes_of(layer: Any) -> list[int]:
    """Return the axes that a normalisation measures over."""
    axes = layer.axis
    return list(axes) if isinstance(axes, Sequence) else [axes]


def _stored(
    run: LabelRun, value: Labelled, variables: Sequence[Any], axes: Sequence[int]
) -> list[Labelled]:
    """Return the labels of variables that lie along these axes of a value."""
    rank = len(value.shape)
    places = [axis % rank for axis in axes]
    shape = tuple(size if axis in places else 1 for axis, size in enumerate(value.shape))
    found = []
    for variable in variables:
        if variable is None:
            continue
        own = run.variable(variable)
        if len(places) == 1:
            found.append(placed(own, shape, places[0]))
        else:
            planes = tuple(_spread(plane.shape, places, rank, plane) for plane in own.planes)
            found.append(Labelled(shape, planes))
    return found


def _spread(sizes: Sequence[int], places: Sequence[int], rank: int, plane: Any) -> Any:
    shape = [1] * rank
    for place, size in zip(places, sizes, strict=True):
        shape[place] = size
    return plane.reshape(shape)
