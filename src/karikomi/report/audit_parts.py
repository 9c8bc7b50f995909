"""The sections of an audit, in audit pages and compress pages: classes, predictions, noise, gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.report.audit_checks import check_sections, verdict_sections
from karikomi.report.bars import Dots, dot_chart
from karikomi.report.charts import line_chart
from karikomi.report.drawing import Axis, Series, drawn
from karikomi.report.page import Chart, Part, Section, Table, Words
from karikomi.report.result_checks import named, records, table
from karikomi.report.verdict import before_after, difference, lower_is_better
from karikomi.report.wording import axis_unit, count, number, percent, plain, scaled

_DRAWN, _LISTED, _EXAMPLES = 30, 100, 50
_TWO = ("before", "after")
_Rows = Sequence[Mapping[str, Any]]


def audit_sections(result: Mapping[str, Any], *, heading: str) -> list[Section]:
    """Return the sections of an audit; its warnings are those of the page."""
    where = "audit"
    metric = named(result.get("metric"))
    classes = records(result.get("classes"), "classes", where=where)
    examples = records(result.get("changed_examples"), "changed_examples", where=where)
    noise = records(result.get("noise"), "noise", where=where)
    parts: list[Part] = [Words(summary(result))]
    if classes:
        parts += [_class_chart(classes, metric), _class_table(classes, metric)]
    sections = [Section(heading, parts)]
    if examples:
        sections.append(Section("Changed predictions", [_example_table(examples)]))
    if noise:
        sections.append(
            Section("Under noise", [_noise_chart(noise, result), _noise_table(noise, metric)])
        )
    gradients = table(result.get("gradient_agreement"))
    if gradients:
        sections.append(Section("Gradients", [Words(_gradient_sentence(gradients))]))
    return [*verdict_sections(result), *sections, *check_sections(result)]


def summary(result: Mapping[str, Any]) -> str:
    """Return the whole audit in one sentence."""
    metric = named(result.get("metric"))
    before, after, moved = before_after(result, metric, "metric_")
    return (
        f"{metric} {before} -> {after} ({moved}) on {count(result.get('examples'))}"
        f" examples; {count(result.get('changed'))} predictions changed"
        f" (agreement {percent(result.get('agreement'), 2)}): {count(result.get('lost'))} lost,"
        f" {count(result.get('gained'))} gained."
    )


def by_loss(classes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the classes, those that lost most first."""
    return sorted(classes, key=lambda row: difference(row.get("after"), row.get("before")) or 0.0)


def _largest_losses(classes: _Rows, most: int) -> tuple[_Rows, str]:
    if len(classes) <= most:
        return classes, ""
    return by_loss(classes)[:most], f"The {most} that lost most of {len(classes)}."


def _class_chart(classes: Sequence[Mapping[str, Any]], metric: str) -> Chart:
    factor, unit = axis_unit(metric)
    shown, note = _largest_losses(classes, _DRAWN)
    rows = [
        Dots(named(entry.get("class")), [scaled(entry.get(key), factor) for key in _TWO])
        for entry in shown
    ]
    svg = drawn(
        lambda: dot_chart(
            "Classes before and after",
            f"Marks: the {metric} of each class before and after.",
            _TWO,
            rows,
            axis=Axis(f"{metric}{unit}"),
        )
    )
    return Chart("Classes before and after", svg, note)


def _class_table(classes: Sequence[Mapping[str, Any]], metric: str) -> Table:
    shown, note = _largest_losses(classes, _LISTED)
    columns = ("class", "examples", "before", "after", "change")
    return Table("Classes", columns, class_rows(shown, metric), note=note)


def class_rows(classes: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[str, ...]]:
    """Return a row of worded cells for each class."""
    return [
        (named(label.get("class")), count(label.get("examples")), *before_after(label, metric))
        for label in classes
    ]


def _example_table(examples: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for example in examples[:_EXAMPLES]:
        label, before, after = (named(example.get(key)) for key in ("label", "before", "after"))
        what = "lost" if before == label else "gained" if after == label else "wrong both times"
        rows.append((named(example.get("index")), label, before, after, what))
    more = len(examples) - len(rows)
    note = f"The first {_EXAMPLES} of {len(examples)}." if more else ""
    return Table("Examples", ("index", "label", "before", "after", ""), rows, names=5, note=note)


def _noise_chart(noise: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Chart:
    metric, moves = named(result.get("metric")), "rises" if lower_is_better(result) else "falls"
    factor, unit = axis_unit(metric)
    series = [
        Series(
            key,
            [(number(entry.get("sigma")), scaled(entry.get(key), factor)) for entry in noise],
            style,
            marks=True,
        )
        for style, key in enumerate(_TWO)
    ]
    svg = drawn(
        lambda: line_chart(
            "Noise on the inputs",
            f"Lines: the {metric} before and after, against the strength of the noise.",
            series,
            x=Axis("standard deviation of the noise"),
            y=Axis(f"{metric}{unit}"),
        )
    )
    return Chart("Noise on the inputs", svg, f"A line that {moves} earlier is less robust.")


def _noise_table(noise: Sequence[Mapping[str, Any]], metric: str) -> Table:
    rows = [
        (plain(entry.get("sigma"), 3), *before_after(entry, metric)) for entry in noise[:_LISTED]
    ]
    return Table("Noise", ("sigma", "before", "after", "change"), rows, names=0)


def _gradient_sentence(gradients: Mapping[str, Any]) -> str:
    return (
        "Cosine between the input gradients of both models: mean"
        f" {plain(gradients.get('mean_cosine'), 3)}, median"
        f" {plain(gradients.get('median_cosine'), 3)}; above 0.9 for"
        f" {percent(gradients.get('share_above_0.9'))} of the examples."
    )
