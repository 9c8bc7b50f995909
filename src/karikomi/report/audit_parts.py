"""The sections of an audit, in audit pages and compress pages: classes, predictions, noise, gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.report.audit_checks import TESTED, check_sections, tested_cells, verdict_sections
from karikomi.report.bars import Dots, dot_chart
from karikomi.report.changed_section import changed_section
from karikomi.report.charts import line_chart
from karikomi.report.drawing import Axis, Series, drawn
from karikomi.report.page import Chart, Part, Section, Table, Words
from karikomi.report.population_section import costs_section, population_section
from karikomi.report.result_checks import named, records, table
from karikomi.report.verdict import before_after, difference, lower_is_better
from karikomi.report.wording import axis_unit, count, number, percent, plain, scaled

_DRAWN, _LISTED = 30, 100
_TWO = ("before", "after")
_Rows = Sequence[Mapping[str, Any]]


def audit_sections(result: Mapping[str, Any], *, heading: str) -> list[Section]:
    """Return the sections of an audit, who pays before where and why; its warnings are those of the page."""
    where = "audit"
    metric = named(result.get("metric"))
    classes = records(result.get("classes"), "classes", where=where)
    noise = records(result.get("noise"), "noise", where=where)
    parts: list[Part] = [Words(summary(result))]
    if limits := limits_sentence(result):
        parts.append(Words(limits))
    if classes:
        parts += [_class_chart(classes, metric), _class_table(classes, metric)]
    checks = check_sections(result)
    made: list[Section | None] = [
        *verdict_sections(result),
        costs_section(table(result.get("costs"))),
        checks.pop("flips", None),
        Section(heading, parts),
        checks.pop("slices", None),
        checks.pop("layers", None),
        changed_section(result),
        population_section(table(result.get("population")), metric),
        checks.pop("corruptions", None),
    ]
    if noise:
        drawn_noise = [_noise_chart(noise, result), _noise_table(noise, metric)]
        made.append(Section("Under noise", drawn_noise))
    made += checks.values()
    gradients = table(result.get("gradient_agreement"))
    if gradients:
        made.append(Section("Gradients", [Words(_gradient_sentence(gradients))]))
    return [section for section in made if section is not None]


def summary(result: Mapping[str, Any]) -> str:
    """Return the whole audit in one sentence."""
    metric = named(result.get("metric"))
    before, after, moved = before_after(result, metric, "metric_")
    whole = f"{metric} {before} -> {after} ({moved}) on {count(result.get('examples'))} examples"
    if result.get("agreement") is None:
        return f"{whole}."
    return (
        f"{whole}; {count(result.get('changed'))} predictions changed"
        f" (agreement {percent(result.get('agreement'), 2)}): {count(result.get('lost'))} lost,"
        f" {count(result.get('gained'))} gained."
    )


def limits_sentence(result: Mapping[str, Any]) -> str:
    """Return what so many examples can and cannot show: the interval of the drop, and the least drop of a class.

    >>> rows = [{"class": "3", "least_drop": 0.012}, {"class": "9", "least_drop": 0.025}]
    >>> limits_sentence({"outcomes": {"drop_interval": [-0.004, 0.004]}, "classes": rows})[-65:]
    'of a class a drop of less than 1.2 to 2.5 points cannot be shown.'
    """
    given = table(result.get("outcomes")).get("drop_interval") or (None, None)
    low, high = (number(end) for end in given)
    if low is None or high is None:
        return ""
    classes = records(result.get("classes"), "classes", where="audit")
    least = [found for row in classes if (found := number(row.get("least_drop"))) is not None]
    said = f"With so many examples the true drop lies between {100 * low:.2f} and {100 * high:.2f} points (95 %)"
    if not least:
        return f"{said}."
    first, last = f"{100 * min(least):.1f}", f"{100 * max(least):.1f}"
    between = first if first == last else f"{first} to {last}"
    return f"{said}; of a class a drop of less than {between} points cannot be shown."


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
    rows = class_rows(shown, metric)
    if any(row.get("p") is not None for row in shown):
        columns = (*columns, "lost", "gained", "p", "points it takes")
        rows = [(*cells, *tested_cells(row)) for cells, row in zip(rows, shown, strict=True)]
        note = f"{note} {TESTED}".strip()
    strong = [place for place, row in enumerate(shown) if row.get("named") is True]
    return Table("Classes", columns, rows, strong=strong, note=note)


def class_rows(classes: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[str, ...]]:
    """Return a row of worded cells for each class."""
    return [
        (named(label.get("class")), count(label.get("examples")), *before_after(label, metric))
        for label in classes
    ]


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
