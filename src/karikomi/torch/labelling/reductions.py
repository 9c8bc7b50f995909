"""Operators that reduce over axes: a sum ends labels; a mean or a maximum is also a statistic of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from karikomi.shrink.label_planes import Labelled
from karikomi.torch.labelling.label_run import Call, LabelRun, Value, bare, rule

STATISTICS = """
    mean amax amin max min var std var_mean std_mean norm linalg_vector_norm logsumexp prod argmax
    argmin any all median frobenius_norm nuclear_norm aminmax
""".split()


@rule("pairwise_distance")
def pairwise_distance(run: LabelRun, call: Call) -> Value:
    """Join two vectors, whose distance is measured over the last axis."""
    met = run.meet([run.value(call["x1"]), run.value(call["x2"])], call.site)
    axis = len(met.shape) - 1
    value = run.over_statistics(call, met, [axis])
    return run.reduce(value, [axis], call.site, keep=bool(call.arguments.get("keepdim")))


@rule("cosine_similarity")
def cosine_similarity(run: LabelRun, call: Call) -> Value:
    """Join both vectors, whose lengths are measured, and end there."""
    met = run.meet([run.value(call["x1"]), run.value(call["x2"])], call.site)
    axis = call["dim"] % len(met.shape)
    return run.reduce(run.over_statistics(call, met, [axis]), [axis], call.site)


@rule("cdist")
def cdist(run: LabelRun, call: Call) -> Value:
    """Join the entries of two sets of vectors, over which their distances are measured."""
    first, other = (run.value(call[name]) for name in ("x1", "x2"))
    met = run.meet([_beside(first, -2), _beside(other, -3)], call.site)
    return run.reduce(run.over_statistics(call, met, [-1]), [len(met.shape) - 1], call.site)


def _beside(value: Labelled, axis: int) -> Labelled:
    """Return a value with a new axis of size 1."""
    rank = len(value.shape) + 1
    planes = tuple(np.expand_dims(plane, axis) for plane in value.planes)
    shape = list(value.shape)
    shape.insert(axis + rank, 1)
    return Labelled(tuple(shape), planes)


@rule("sum", *STATISTICS)
def reduction(run: LabelRun, call: Call) -> Value:
    """End the labels along the reduced axes."""
    value = run.value(call.node.args[0])
    if call.name in ("max", "min") and call.arguments.get("other") is not None:
        return run.meet([value, run.value(call["other"])], call.site)
    rank = len(value.shape)
    axes: Any = call.arguments.get("dim")
    if axes is None or axes == []:
        axes = range(rank)
    axes = [axis % max(rank, 1) for axis in ([axes] if isinstance(axes, int) else axes)]
    if call.name != "sum":
        value = run.over_statistics(call, value, axes)
    left = run.reduce(value, axes, call.site, keep=bool(call.arguments.get("keepdim")))
    found = bare(call.node)
    if isinstance(found, list):
        return [Labelled(part.shape, left.planes) for part in found]
    return Labelled(found.shape, left.planes)
