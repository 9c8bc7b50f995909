"""Layers and operations that only move data: the same movement is applied to the labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from karikomi.keras.labelling.contractions import channel_axis
from karikomi.keras.labelling.label_run import Call, LabelRun, Value, placed, rule
from karikomi.shrink.label_planes import Labelled, moved, part_of, reshaped

Movement = Callable[[np.ndarray], np.ndarray]


def apply(run: LabelRun, call: Call, value: Labelled, movement: Movement) -> Labelled:
    """Return the labels after a movement."""
    value = run.current(value, call.site)
    planes = tuple(moved(plane, value.shape, movement) for plane in value.planes)
    return run.current(Labelled(call.shape, planes), call.site)


@rule("layers.Reshape", "layers.Flatten", "ops.Reshape", "ops.Ravel")
@rule("ops.ExpandDims", "ops.Squeeze", "layers.RepeatVector")
def reshape(run: LabelRun, call: Call) -> Value:
    """Split and merge axes."""
    value = run.current(call.values[0], call.site)
    if not value.planes:
        return Labelled(call.shape)
    if isinstance(call.operation, keras.layers.Flatten) and channel_axis(call.operation) == 1:
        order = (0, *range(2, len(value.shape)), *range(1, min(2, len(value.shape))))
        value = _permuted(value, order)
    if isinstance(call.operation, keras.layers.RepeatVector):
        return placed(run.vector(value, -1, call.site), call.shape, -1)
    places = _alike(value, call)
    if places is None:
        return run.refuse(call, "a size that is not known is merged with others")
    before, after = places
    planes = tuple(
        reshaped(plane.reshape(plane.shape[before:]), value.shape[before:], call.shape[after:])
        for plane in value.planes
    )
    planes = tuple(plane.reshape(*(1,) * after, *plane.shape) for plane in planes)
    return run.current(Labelled(call.shape, planes), call.site)


def _alike(value: Labelled, call: Call) -> tuple[int, int] | None:
    """Return axes from which on a tensor and its reshaped one have equally many entries, all sizes being known.

    Labels vary along none of those before them.
    """
    for before in range(min(value.axes), call.known[0] - 1, -1):
        entries = math.prod(value.shape[before:])
        for after in range(len(call.shape) - 1, call.known[1] - 1, -1):
            if math.prod(call.shape[after:]) == entries:
                return before, after
    return None


@rule("layers.Permute", "ops.Transpose", "ops.Swapaxes", "ops.Moveaxis")
def permute(run: LabelRun, call: Call) -> Value:
    """Permute the axes."""
    value = run.current(call.values[0], call.site)
    return _permuted(value, order_of(call.operation, len(value.shape)))


def order_of(operation: Any, rank: int) -> tuple[int, ...]:
    """Return the order of axes that a permutation makes.

    >>> order_of(keras.layers.Permute((2, 1)), 3)
    (0, 2, 1)
    """
    if hasattr(operation, "dims"):
        return (0, *operation.dims)
    places = np.arange(rank)
    if hasattr(operation, "axis1"):
        pair = [operation.axis1, operation.axis2]
        places[pair] = places[pair[::-1]]
    elif hasattr(operation, "source"):
        empty = np.empty((1,) * 0 + tuple(range(2, rank + 2)), bool)
        sizes = np.moveaxis(empty, operation.source, operation.destination).shape
        places = np.array(sizes) - 2
    elif operation.axes is None:
        places = places[::-1]
    else:
        places = np.array(operation.axes) % rank
    return tuple(places.tolist())


def _permuted(value: Labelled, order: tuple[int, ...]) -> Labelled:
    shape = tuple(value.shape[axis] for axis in order)
    return Labelled(shape, tuple(plane.transpose(order) for plane in value.planes))


@rule("layers.Concatenate", "ops.Concatenate")
def concatenate(run: LabelRun, call: Call) -> Value:
    """Put the labels side by side along the axis, and join those of all other axes."""
    return run.side_by_side(call.values, call.operation.axis % len(call.shape), call.site)


@rule("ops.Stack")
def stack(run: LabelRun, call: Call) -> Value:
    """Join the labels of all tensors, which get an axis that stays."""
    met = run.meet(call.values, call.site)
    axis = call.operation.axis % len(call.shape)
    return Labelled(call.shape, tuple(np.expand_dims(plane, axis) for plane in met.planes))


@rule("ops.Split")
def split(run: LabelRun, call: Call) -> Value:
    """Cut the labels along the axis."""
    value = run.current(call.values[0], call.site)
    axis = call.operation.axis % len(value.shape)
    start, parts = 0, []
    for shape in call.shapes:
        planes = (
            plane if plane.shape[axis] == 1 else part_of(plane, axis, start, shape[axis])
            for plane in value.planes
        )
        parts.append(run.current(Labelled(shape, tuple(planes)), call.site))
        start += shape[axis]
    return parts


@rule("ops.GetItem")
def get_item(run: LabelRun, call: Call) -> Value:
    """Cut and pick by numbers that stand in the code; an axis with another step or a list of places stays."""
    value = run.current(call.values[0], call.site)
    key = call.argument(1, "key")
    if len(call.values) > 1 or not plain_key(key):
        return run.refuse(call, "places that are computed have no rule")
    axes = [
        axis
        for axis, part in by_axis(key, len(value.shape))
        if isinstance(part, slice) and part.step not in (None, 1)
    ]
    value = run.fix(value, call.site, axes)
    return apply(run, call, value, lambda plane: plane[_as_tuple(key)])


def plain_key(key: Any) -> bool:
    """Return whether a key has only slices and single places."""
    return all(
        part is None or part is Ellipsis or isinstance(part, int | slice) for part in _as_tuple(key)
    )


def by_axis(key: Any, rank: int) -> list[tuple[int, Any]]:
    """Return the axis that each slice or place of a key is for.

    >>> by_axis((Ellipsis, None, slice(2)), 3)
    [(2, slice(None, 2, None))]
    """
    parts = _as_tuple(key)
    named = len([part for part in parts if part is not None and part is not Ellipsis])
    found, axis = [], 0
    for part in parts:
        if part is Ellipsis:
            axis += rank - named
        elif part is not None:
            found.append((axis, part))
            axis += 1
    return found


def _as_tuple(key: Any) -> tuple[Any, ...]:
    return tuple(key) if isinstance(key, tuple | list) else (key,)


@rule("ops.Pad")
def pad(run: LabelRun, call: Call) -> Value:
    """Pad: zeros get labels of their own along axes that have labels."""
    operation, value = call.operation, call.values[0]
    widths = widths_of(operation, len(value.shape))
    if operation.mode != "constant" or len(call.args) > 1:
        value = run.fix(run.current(value, call.site), call.site, widths)
        return Labelled(call.shape, value.planes)
    return Labelled(call.shape, run.padded(value, widths, call.site).planes)


def widths_of(operation: Any, rank: int) -> dict[int, tuple[int, int]]:
    """Return axis -> how much is padded before and after, of those that are."""
    widths = operation.pad_width
    widths = widths * rank if len(widths) == 1 else widths
    return {axis: tuple(pair) for axis, pair in enumerate(widths) if any(pair)}


@rule("ops.Repeat")
def repeat(run: LabelRun, call: Call) -> Value:
    """Repeat the labels too, an equal number of times each."""
    repeats, axis = call.operation.repeats, call.operation.axis
    if not isinstance(repeats, int) or axis is None:
        return run.refuse(call)
    return apply(run, call, call.values[0], lambda plane: np.repeat(plane, repeats, axis))


@rule("ops.Flip", "ops.Roll")
def along_whole_axes(run: LabelRun, call: Call) -> Value:
    """Keep the axes that the operation works along as they are."""
    value, axes = run.current(call.values[0], call.site), call.operation.axis
    rank = len(value.shape)
    axes = range(rank) if axes is None else [axes] if isinstance(axes, int) else axes
    return run.fix(value, call.site, [axis % rank for axis in axes])


@rule("ops.BroadcastTo")
def broadcast_to(run: LabelRun, call: Call) -> Value:
    """Pass the labels; axes that get longer have none."""
    return run.meet([call.values[0], Labelled(call.shape)], call.site)
