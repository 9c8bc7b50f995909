"""Pooling, resampling and other operators along the last axes, which stay as they are."""

from __future__ import annotations

import re

from karikomi.shrink.label_planes import Labelled, reshaped
from karikomi.torch.labelling.label_run import Call, LabelRun, Value, bare, rule, shape_of

_POOLS = [
    f"{kind}_pool{axes}d{leaf}"
    for axes in (1, 2, 3)
    for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp", "fractional_max")
    for leaf in ("", "_with_indices")
] + [f"_adaptive_avg_pool{axes}d" for axes in (2, 3)]
_RESAMPLED = [
    f"{'_' if exact else ''}upsample_{kind}{exact}{axes}d{leaf}"
    for kind, axes in (("nearest", 1), ("nearest", 2), ("nearest", 3), ("linear", 1), ("bilinear", 2),
                       ("trilinear", 3), ("bicubic", 2))
    for leaf in ("", "_aa")
    for exact in ("", "_exact")
] + ["_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact1d",
     "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"]  # fmt: skip
_PADS = [f"{kind}_pad{axes}d" for kind in ("reflection", "replication") for axes in (1, 2, 3)]


@rule(*_POOLS, *_RESAMPLED, *_PADS)
def over_places(run: LabelRun, call: Call) -> Value:
    """Pass the labels of all axes but the last ones."""
    value = run.current(run.value(call.node.args[0]), call.site)
    axes = int(re.findall(r"(\d)d", call.name)[0])
    rank = len(value.shape)
    left = run.fix(value, call.site, list(range(rank - axes, rank)))
    found = bare(call.node)
    if isinstance(found, list):
        return [Labelled(part.shape, left.planes) for part in found]
    return Labelled(found.shape, left.planes)


@rule("max_unpool2d", "max_unpool3d")
def max_unpool(run: LabelRun, call: Call) -> Value:
    """Join the channels of a tensor and of the places where its entries go."""
    axes = int(call.name[-2])
    value = run.meet([run.value(call["self"]), run.value(call["indices"])], call.site)
    rank = len(value.shape)
    left = run.fix(value, call.site, list(range(rank - axes, rank)))
    return Labelled(shape_of(call.node.meta["val"]), left.planes)


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(run: LabelRun, call: Call) -> Value:
    """Pass the channels of the sampled tensor; the grid stays."""
    value = run.current(run.value(call.node.args[0]), call.site)
    run.fix(run.value(call.node.args[1]), call.site)
    left = run.fix(value, call.site, [0, *range(2, len(value.shape))])
    found = bare(call.node)
    return found if isinstance(found, list) else Labelled(found.shape, left.planes)


@rule("im2col")
def im2col(run: LabelRun, call: Call) -> Value:
    """Pass each channel to all its places in a window."""
    value = run.current(run.value(call["self"]), call.site)
    places = len(call["kernel_size"])
    rank = len(value.shape)
    value = run.fix(value, call.site, list(range(rank - places, rank)))
    shape = shape_of(call.node.meta["val"])
    channels = value.shape[rank - places - 1]
    wide = (*shape[:-2], channels, shape[-2] // channels, 1)
    planes = (
        reshaped(plane.reshape(*plane.shape[: rank - places], 1, 1), wide, (*shape[:-1], 1))
        for plane in value.planes
    )
    return Labelled(shape, tuple(planes))


@rule("col2im")
def col2im(run: LabelRun, call: Call) -> Value:
    """Sum the places of the windows back into channels."""
    value = run.current(run.value(call["self"]), call.site)
    value = run.fix(value, call.site, [len(value.shape) - 1])
    shape = shape_of(call.node.meta["val"])
    rank, places = len(shape), len(call["kernel_size"])
    channels = shape[rank - places - 1]
    lead = shape[: rank - places - 1]
    split = (*lead, channels, value.shape[-2] // channels)
    flat = tuple(plane.reshape(plane.shape[:-1]) for plane in value.planes)
    wide = Labelled(split, tuple(reshaped(plane, value.shape[:-1], split) for plane in flat))
    wide = run.fix(run.current(wide, call.site), call.site, [len(split) - 1])
    ones = (1,) * places
    return Labelled(shape, tuple(p.reshape(*p.shape[:-1], *ones) for p in wide.planes))
