"""Operators that reduce over axes: a sum ends labels; a mean or a maximum is also a statistic of them."""

from __future__ import annotations

from typing import Any

from karikomi.shrink.label_planes import Labelled
from karikomi.torch.shrinking.label_run import Call, LabelRun, Value, bare, rule

STATISTICS = """
    mean amax amin max min var std var_mean std_mean norm linalg_vector_norm logsumexp prod argmax
    argmin any all median frobenius_norm nuclear_norm aminmax
""".split()


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
