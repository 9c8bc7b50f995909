"""Operators that only move data: torch applies them to the labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from karikomi.shrink.label_planes import Labelled, evened, narrowed, reshaped
from karikomi.torch.labelling.label_run import (
    Call,
    LabelRun,
    Value,
    bare,
    name_of,
    rule,
    shape_of,
    size_of,
)

MOVEMENT = """
    permute transpose t numpy_T swapaxes swapdims movedim moveaxis select narrow unbind flip fliplr
    flipud rot90 tile pixel_shuffle pixel_unshuffle channel_shuffle unfold diagonal mT
    split split_with_sizes chunk tensor_split hsplit vsplit dsplit unsafe_split unsafe_chunk slice adjoint
    view_as_real view_as_complex
""".split()

AT_PLACES = frozenset({"gather", "take_along_dim", "scatter", "scatter_add", "scatter_reduce"})

RESHAPES = (
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as".split()
)


@rule(*MOVEMENT)
def movement(run: LabelRun, call: Call) -> Value:
    """Apply the operator itself to the labels."""
    source = call.node.args[0]
    value = run.current(run.value(source), call.site)
    if not value.planes:
        return bare(call.node)
    if call.name in ("view_as_real", "view_as_complex"):
        return _as_pairs(run, call, value)
    return apply(run, call, value)


def apply(run: LabelRun, call: Call, value: Labelled) -> Value:
    """Return the labels after an operator that torch applies to each plane."""
    first, *rest = call.node.args
    arguments = fx.map_arg(tuple(rest), _example)
    options = fx.map_arg(dict(call.node.kwargs), _example)
    target: Any = call.node.target

    def run_it(plane: torch.Tensor) -> Any:
        return target(plane, *arguments, **options)

    found = bare(call.node)
    if not isinstance(found, list):
        return _checked(
            run, call, found.shape, [moved(p, value.shape, run_it) for p in value.planes]
        )
    parts: list[list[np.ndarray]] = [[] for _ in found]
    for plane in value.planes:
        for place, part in enumerate(run_it(_expanded(plane, value.shape))):
            parts[place].append(_narrowed(part))
    return [
        _checked(run, call, empty.shape, planes) for empty, planes in zip(found, parts, strict=True)
    ]


def moved(
    plane: np.ndarray, shape: tuple[int, ...], movement: Callable[[torch.Tensor], torch.Tensor]
) -> np.ndarray:
    """Return a plane after a movement of the data of its tensor, which torch itself applies to the labels."""
    return _narrowed(movement(_expanded(plane, shape)))


def _expanded(plane: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    # torch warns of arrays that it must not write to.
    own = plane if plane.flags.writeable else plane.copy()
    return torch.from_numpy(own).expand(shape)


def _narrowed(plane: torch.Tensor) -> np.ndarray:
    return narrowed(plane.numpy())


def _checked(
    run: LabelRun, call: Call, shape: tuple[int, ...], planes: Sequence[np.ndarray]
) -> Labelled:
    return run.current(Labelled(shape, tuple(planes)), call.site)


def _example(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return size_of(value) if isinstance(value, torch.SymInt) else value


@rule(*RESHAPES)
def reshape(run: LabelRun, call: Call) -> Value:
    """Split and merge axes."""
    value = run.current(run.value(call.node.args[0]), call.site)
    shape = shape_of(call.node.meta["val"])
    planes = tuple(reshaped(plane, value.shape, shape) for plane in value.planes)
    return run.current(Labelled(shape, planes), call.site)


def _as_pairs(run: LabelRun, call: Call, value: Labelled) -> Value:
    shape = shape_of(call.node.meta["val"])
    if call.name == "view_as_real":
        return Labelled(shape, tuple(plane[..., None] for plane in value.planes))
    value = run.fix(value, call.site, [len(value.shape) - 1])
    return Labelled(shape, tuple(plane[..., 0] for plane in value.planes))


@rule("expand", "expand_as", "broadcast_to")
def expand(run: LabelRun, call: Call) -> Value:
    """Repeat along axes of size 1, which get labels of their own: how often can change as well."""
    value = run.value(call["self"])
    shape = shape_of(call.node.meta["val"])
    added = len(shape) - len(value.shape)
    old = (1,) * added + value.shape
    # Integers that are repeated are places; those that are read or written at have the shape of what is there.
    picked = any(name_of(user) in AT_PLACES for user in call.node.users)
    numbers = picked or call.node.meta["val"].is_floating_point()
    wider = [axis for axis, size in enumerate(shape) if numbers and size > 1 and old[axis] == 1]
    planes = tuple(plane.reshape((1,) * added + tuple(plane.shape)) for plane in value.planes)
    return Labelled(shape, planes + run.fresh("", shape, wider).planes)


_TRANSFORMS = [
    f"fft_{kind}{leaf}"
    for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
    for leaf in ("", "2", "n")
]


@rule("roll", "cumsum", "cumprod", "sort", "argsort", "topk", "triu", "tril", *_TRANSFORMS)
def along_whole_axes(run: LabelRun, call: Call) -> Value:
    """Keep the axes that the operator works along as they are."""
    value = run.value(call["self"])
    axes: Any = call.arguments.get("dims", call.arguments.get("dim"))
    if call.name in ("triu", "tril"):
        axes = [-1, -2]
    if axes is None or axes == []:
        axes = list(range(len(value.shape)))
    axes = [
        axis % max(len(value.shape), 1)
        for axis in (axes if isinstance(axes, list | tuple) else [axes])
    ]
    left = run.fix(run.current(value, call.site), call.site, axes)
    found = bare(call.node)
    if isinstance(found, list):
        return [Labelled(part.shape, left.planes) for part in found]
    return Labelled(found.shape, left.planes)


@rule("repeat", "repeat_interleave")
def repeat(run: LabelRun, call: Call) -> Value:
    """Repeat the labels too."""
    value = run.current(run.value(call["self"]), call.site)
    if isinstance(call.arguments.get("repeats"), fx.Node):
        value = run.fix(value, call.site)
    return apply(run, call, value) if value.planes else bare(call.node)


@rule("cat", "concat", "concatenate")
def cat(run: LabelRun, call: Call) -> Value:
    """Put the labels side by side along the axis, and join those of all other axes."""
    values = [run.value(source) for source in call["tensors"]]
    shape = shape_of(call.node.meta["val"])
    # torch leaves out empty tensors of one axis.
    values = [value for value in values if value.shape != (0,)]
    if not values:
        return bare(call.node)
    return run.side_by_side(values, call["dim"] % len(shape), call.site)


@rule("stack")
def stack(run: LabelRun, call: Call) -> Value:
    """Join the labels of all tensors, which get an axis that stays."""
    values = [run.value(source) for source in call["tensors"]]
    shape = shape_of(call.node.meta["val"])
    met = run.meet(values, call.site)
    axis = call["dim"] % len(shape)
    return Labelled(shape, tuple(np.expand_dims(plane, axis) for plane in met.planes))


@rule("index")
def index(run: LabelRun, call: Call) -> Value:
    """Pick entries; an axis that is picked from stays, unless the places are one stored vector."""
    value = run.current(run.value(call["self"]), call.site)
    if not value.planes:
        return bare(call.node)
    chosen = {axis: place for axis, place in enumerate(call["indices"]) if place is not None}
    constants = {axis: run.constant(place) for axis, place in chosen.items()}
    single = len(chosen) == 1 and all(
        place is not None
        and place.dim() == 1
        and not place.dtype.is_floating_point
        and place.dtype is not torch.bool
        for place in constants.values()
    )
    if not single:
        value = run.fix(value, call.site, list(chosen))
    shape = shape_of(call.node.meta["val"])
    places = [
        (constants[axis] if single else torch.zeros(_shape(place), dtype=torch.int64))
        if axis in chosen
        else None
        for axis, place in enumerate(call["indices"])
    ]
    if not single and any(_is_mask(place) for place in chosen.values()):
        return run.refuse(call) if value.planes else bare(call.node)
    target: Any = call.node.target
    planes = [moved(plane, value.shape, lambda p: target(p, places)) for plane in value.planes]
    return run.current(Labelled(shape, tuple(evened(plane) for plane in planes)), call.site)


def _shape(place: Any) -> tuple[int, ...]:
    return shape_of(place.meta["val"]) if isinstance(place, fx.Node) else tuple(place.shape)


def _is_mask(place: Any) -> bool:
    return isinstance(place, fx.Node) and place.meta["val"].dtype is torch.bool


@rule("index_select")
def index_select(run: LabelRun, call: Call) -> Value:
    """Pick entries along an axis."""
    value = run.current(run.value(call["self"]), call.site)
    axis = call["dim"] % max(len(value.shape), 1)
    place = run.constant(call["index"])
    shape = shape_of(call.node.meta["val"])
    if place is None:
        value = run.fix(value, call.site, [axis])
        return Labelled(shape, value.planes)
    chosen: torch.Tensor = place
    planes = tuple(
        moved(plane, value.shape, lambda p: p.index_select(axis, chosen)) for plane in value.planes
    )
    return run.current(Labelled(shape, planes), call.site)


@rule("embedding")
def embedding(run: LabelRun, call: Call) -> Value:
    """Pick rows, which stay; the columns pass."""
    weight = run.fix(run.current(run.value(call["weight"]), call.site), call.site, [0])
    shape = shape_of(call.node.meta["val"])
    lead = (1,) * (len(shape) - 2)
    return Labelled(shape, tuple(plane.reshape(*lead, *plane.shape) for plane in weight.planes))


@rule("embedding_bag")
def embedding_bag(run: LabelRun, call: Call) -> Value:
    """Sum, average or compare rows, which stay; the columns pass. The other results are counts."""
    weight = run.fix(run.current(run.value(call["weight"]), call.site), call.site, [0])
    if call["per_sample_weights"] is not None:
        run.fix(run.value(call["per_sample_weights"]), call.site)
    found: Any = bare(call.node)
    rows, *counts = found
    return [Labelled(rows.shape, weight.planes), *counts]


@rule("constant_pad_nd", "pad")
def pad(run: LabelRun, call: Call) -> Value:
    """Pad: the padding gets labels of its own along axes that have labels, if it is a constant."""
    value = run.current(run.value(call["self"]), call.site)
    shape = shape_of(call.node.meta["val"])
    widths = list(call["pad"])
    mode = call.arguments.get("mode", "constant")
    rank = len(shape)
    padded = {
        rank - 1 - place: (widths[2 * place], widths[2 * place + 1])
        for place in range(len(widths) // 2)
        if any(widths[2 * place : 2 * place + 2])
    }
    if mode != "constant" or any(min(pair) < 0 for pair in padded.values()):
        value = run.fix(value, call.site, list(padded))
        return Labelled(shape, value.planes)
    return run.padded(value, padded, call.site)
