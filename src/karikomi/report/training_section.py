"""Curves of a training from its record: loss, gradient norm with the clipped steps, validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.report.charts import Band, line_chart
from karikomi.report.drawing import Axis, Series, drawn
from karikomi.report.page import Chart, Part, Section, Words
from karikomi.report.record_curves import History, Point, peaks, read_history, thin
from karikomi.report.result_checks import named
from karikomi.report.verdict import clip_sentence
from karikomi.report.wording import axis_unit, count, scaled

# The ratio from which most of a loss curve would be near zero on a linear axis.
_WIDE = 50.0
_NAMED_STAGES = 12


def training_section(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Section:
    """Return the section on training; without rows a sentence that nothing was recorded."""
    history = read_history(rows)
    parts: list[Part] = [Words(text) for text in (clip_sentence(result),) if text]
    if not history.stages:
        parts.append(Words("No steps were recorded, so there are no curves."))
        return Section("Training", parts)
    bands = [
        Band(stage.name, str(index), stage.first, stage.last)
        for index, stage in enumerate(history.stages, 1)
    ]
    parts.append(Words(_stages_sentence(history)))
    if history.loss:
        parts += [loss_chart(history, bands), norm_chart(history, bands)]
    if any(value is not None for _, value in history.validation):
        parts.append(validation_chart(history, bands, named(result["metric"])))
    return Section("Training", parts)


def _stages_sentence(history: History) -> str:
    stages = [
        f"{index} {stage.name} (steps {count(stage.first)} to {count(stage.last)})"
        for index, stage in enumerate(history.stages[:_NAMED_STAGES], 1)
    ]
    more = len(history.stages) - len(stages)
    return "Stages: " + ", ".join(stages) + (f" and {more} more." if more else ".")


def loss_chart(history: History, bands: Sequence[Band] = ()) -> Chart:
    """Return the training loss at each step, on a log axis for a wide range."""
    values = [value for _, value in history.loss if value is not None]
    log = bool(values) and min(values) > 0 and max(values) / min(values) > _WIDE
    svg = drawn(
        lambda: line_chart(
            "Loss",
            "Line: the training loss at each step.",
            [Series("loss", thin(history.loss))],
            x=Axis("step"),
            y=Axis("training loss" + (" (log scale)" if log else ""), log=log),
            bands=bands,
        )
    )
    return Chart("Loss", svg, "Lowest and highest value of each few steps, so that spikes stay.")


def norm_chart(history: History, bands: Sequence[Band] = ()) -> Chart:
    """Return the gradient norm before and after clipping, with marks for clipped and skipped steps."""
    top = max((value for _, value in history.norm if value is not None), default=1.0)
    # A skipped step has no finite norm; its mark is drawn at the top of the picture.
    skipped: list[Point] = [(x, top if y is None else y) for x, y in history.skipped]
    span = (history.stages[0].first, history.stages[-1].last)
    series = [
        # The lower line first: for steps that were not clipped, the other covers it.
        Series("after clipping", thin(history.after), 2),
        Series("before clipping", thin(history.norm), 0),
        Series(
            f"clipped ({count(len(history.clipped))})", peaks(history.clipped, span), 1, False, True
        ),
        Series(f"skipped ({count(len(history.skipped))})", peaks(skipped, span), 4, False, True),
    ]
    svg = drawn(
        lambda: line_chart(
            "Gradient norm",
            "Lines: the gradient norm before and after clipping; marks: clipped and skipped steps.",
            [curve for curve in series if curve.points],
            x=Axis("step"),
            y=Axis("gradient norm (log scale)", log=True),
            bands=bands,
        )
    )
    note = "Steps that were clipped bear a mark; marks that would lie on one another are one."
    return Chart("Gradient norm", svg, note)


def validation_chart(history: History, bands: Sequence[Band], metric: str) -> Chart:
    """Return a metric on the validation split after each epoch."""
    factor, unit = axis_unit(metric)
    points = [(x, scaled(y, factor)) for x, y in thin(history.validation)]
    svg = drawn(
        lambda: line_chart(
            "Validation",
            f"Line: the {metric} on the validation split after each epoch.",
            [Series(metric, points, marks=len(points) <= 60)],
            x=Axis("step"),
            y=Axis(f"validation {metric}{unit}"),
            bands=bands,
        )
    )
    return Chart("Validation", svg, "After each epoch.")
