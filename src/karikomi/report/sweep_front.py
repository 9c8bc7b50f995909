"""The front of a sweep as a chart: the metric on the validation split over bytes, with what no other point betters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.report.charts import line_chart
from karikomi.report.drawing import Axis, Series, drawn
from karikomi.report.page import Chart
from karikomi.report.sweep_axes import column_name, mean_of, setting_name
from karikomi.report.wording import axis_unit, score, size


def front_chart(points: Sequence[Mapping[str, Any]], metric: str) -> Chart | None:
    """Return the chart; None of a result without a front, as earlier versions wrote."""
    factor, end = axis_unit(metric)
    placed = []
    for point in points:
        value, cost = mean_of(point, "validation"), mean_of(point, "bytes")
        if value is not None and cost is not None and cost > 0:
            placed.append((cost, factor * value, point))
    best = sorted((item for item in placed if item[2].get("front") is True), key=lambda i: i[:2])
    if not best:
        return None
    others = [(x, y) for x, y, point in placed if point.get("front") is not True]
    title = f"{metric} on the validation split over bytes"
    series = [Series("the front", [(x, y) for x, y, _ in best], 0, marks=True)]
    series += [Series("other settings", others, 1, line=False, marks=True)] if others else []
    svg = drawn(
        lambda: line_chart(
            title,
            "One mark for each setting; the line joins those that no other betters in both.",
            series,
            x=Axis("bytes of the file", log=True, wording=size),
            y=Axis(f"{metric}{end}"),
        )
    )
    words = "; ".join(
        f"{size(mean_of(point, 'bytes'))} and {score(mean_of(point, 'validation'), metric)}: limit "
        f"{setting_name(point)}, {column_name({k: point.get(k) for k in ('sparsity', 'bits')})}"
        for _, _, point in best[:6]
    )
    more = f"; and {len(best) - 6} more" if len(best) > 6 else ""
    return Chart(title, svg, f"The front: {words}{more}.")
