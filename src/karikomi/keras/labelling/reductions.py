"""Operations that reduce over axes: a sum ends labels; a mean or a maximum is also a statistic of them."""

from __future__ import annotations

from typing import Any

from karikomi.keras.labelling.label_run import Call, LabelRun, Value, rule
from karikomi.shrink.label_planes import Labelled

STATISTICS = (
    *("Mean", "Max", "Amax", "Min", "Amin", "Var", "Std", "Prod", "Logsumexp"),
    *("Any", "All", "Median"),
)


@rule(*(f"ops.{name}" for name in ("Sum", *STATISTICS)))
def reduction(run: LabelRun, call: Call) -> Value:
    """End the labels along the reduced axes."""
    operation, value = call.operation, call.values[0]
    rank = len(value.shape)
    axes: Any = operation.axis
    axes = range(rank) if axes is None else [axes] if isinstance(axes, int) else axes
    axes = [axis % rank for axis in axes]
    if type(operation).__name__ != "Sum":
        value = run.over_statistics(call, value, axes)
    left = run.reduce(value, axes, call.site, keep=bool(operation.keepdims))
    return Labelled(call.shape, left.planes)
