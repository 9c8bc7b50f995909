"""The sections of an audit's further checks: gates, slices, corruptions, calibration, layers, explanation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from karikomi.report.bars import Dots, dot_chart
from karikomi.report.drawing import Axis, drawn
from karikomi.report.explanation_section import explanation_section
from karikomi.report.page import Chart, Part, Points, Section, Table, Words
from karikomi.report.result_checks import named, records, table
from karikomi.report.wording import axis_unit, count, number, percent, plain, scaled, score

_Rows = Sequence[Mapping[str, Any]]
_LISTED = 40


def verdict_sections(result: Mapping[str, Any]) -> list[Section]:
    """Return what stands first: the gates, and what was not checked."""
    made = [
        _gates(records(result.get("gates"), "gates", where="audit")),
        _not_checked(table(result.get("not_checked"))),
    ]
    return [section for section in made if section is not None]


def check_sections(result: Mapping[str, Any]) -> dict[str, Section]:
    """Return the sections of those checks that a result has, by their key."""
    metric = named(result.get("metric"))
    made = {
        "flips": _flips(table(result.get("outcomes"))),
        "slices": _slices(records(result.get("slices"), "slices", where="audit"), metric),
        "layers": _layers(records(result.get("layers"), "layers", where="audit"), metric),
        "corruptions": _corruptions(table(result.get("corruptions")), metric),
        "attack": _attack(table(result.get("attack")), metric),
        "calibration": _calibration(table(result.get("calibration"))),
        "explanation": explanation_section(table(result.get("explanation"))),
    }
    return {name: section for name, section in made.items() if section is not None}


def gate_rows(gates: _Rows) -> list[tuple[str, ...]]:
    """Return a row of worded cells for each gate."""
    rows = []
    for gate in gates:
        interval = gate.get("interval")
        between = "" if not interval else f"{plain(interval[0], 3)} to {plain(interval[1], 3)}"
        rows.append(
            (
                named(gate.get("gate")),
                named(gate.get("outcome")),
                plain(gate.get("value")),
                between,
                named(gate.get("where"), ""),
            )
        )
    return rows


def _gates(gates: _Rows) -> Section | None:
    if not gates:
        return None
    columns = ("fails if", "outcome", "value", "95 % interval", "where")
    strong = [i for i, gate in enumerate(gates) if gate.get("outcome") != "held"]
    return Section("Gates", [Table("Gates", columns, gate_rows(gates), names=2, strong=strong)])


def _not_checked(reasons: Mapping[str, Any]) -> Section | None:
    if not reasons:
        return None
    items = [f"{name.replace('_', ' ')}: {named(why)}" for name, why in reasons.items()]
    return Section("Not checked", [Points(items)])


def _flips(found: Mapping[str, Any]) -> Section | None:
    if not found:
        return None
    names = {
        "drop": "drop of the accuracy",
        "negative_flips": "negative flips: right before, wrong after",
        "positive_flips": "positive flips: wrong before, right after",
        "churn": "churn: another prediction than before",
    }
    rows = []
    for name, words in names.items():
        low, high = found.get(f"{name}_interval") or (None, None)
        rows.append(
            (words, percent(found.get(name), 2), f"{percent(low, 2)} to {percent(high, 2)}")
        )
    note = "The drop is negative minus positive flips: equal accuracies can hide many of both."
    return Section("Flips", [Table("Flips", ("", "share", "95 % interval"), rows, note=note)])


def _slices(rows: _Rows, metric: str) -> Section | None:
    if not rows:
        return None
    shown = sorted(rows, key=lambda row: number(row.get("p")) or 0.0)[:_LISTED]
    share = metric == "accuracy"
    cells = [
        (
            named(row.get("slice")),
            count(row.get("examples")),
            *(percent(row.get(k), 1) if share else plain(row.get(k)) for k in ("before", "after")),
            *tested_cells(row, share=share),
        )
        for row in shown
    ]
    moved = ("lost", "gained") if share else ("worse", "better")
    columns = ("slice", "examples", "before", "after", *moved, "p", LEAST if share else LEAST_DROP)
    strong = [i for i, row in enumerate(shown) if row.get("named")]
    note = TESTED if share else MEANS_TESTED
    return Section("Slices", [Table("Slices", columns, cells, strong=strong, note=note)])


LEAST, LEAST_DROP = "points it takes", "drop it takes"
TESTED = "p: exact paired test, adjusted over all of them. So many points would have to be lost to be found."
MEANS_TESTED = "p: normal test of the mean difference, adjusted over all slices. So large a drop would be found."


def tested_cells(row: Mapping[str, Any], *, share: bool = True) -> tuple[str, ...]:
    """Return what the paired test of a class or slice says: lost, gained, p, and the points that it takes."""
    least = row.get("least_drop")
    points = (
        f"{100 * exact:.1f}" if share and (exact := number(least)) is not None else plain(least)
    )
    return count(row.get("lost")), count(row.get("gained")), plain(row.get("p"), 2), points


def _corruptions(found: Mapping[str, Any], metric: str) -> Section | None:
    rows = records(found.get("rows"), "corruptions", where="audit")
    if not rows:
        return None
    factor, unit = axis_unit(metric)
    dots, cells = [], []
    for row in rows:
        means = [_mean(row.get(key)) for key in ("before", "after")]
        dots.append(Dots(named(row.get("corruption")), [scaled(mean, factor) for mean in means]))
        cells.append(
            (
                named(row.get("corruption")),
                *(plain(scaled(mean, factor), 4) for mean in means),
                plain(scaled(row.get("drop"), factor), 3),
                plain(row.get("relative"), 3),
                plain(row.get("p"), 2),
            )
        )
    svg = drawn(
        lambda: dot_chart(
            "Corrupted inputs",
            f"Marks: the mean {metric} over five severities before and after.",
            ("before", "after"),
            dots,
            axis=Axis(f"{metric}{unit}"),
        )
    )
    columns = ("corruption", "before", "after", "drop", "errors, relative", "p")
    note = (
        f"Means over five severities on {count(found.get('examples'))} examples. p: is the drop larger than on clean"
        " inputs? adjusted over all corruptions."
    )
    parts: list[Part] = [
        Chart("Corrupted inputs", svg),
        Table("Corruptions", columns, cells, note=note),
    ]
    return Section("Under corruption", parts)


def _mean(values: Any) -> float | None:
    known = [number(value) for value in values or []]
    return None if not known or None in known else sum(known) / len(known)  # type: ignore[arg-type]


def _attack(found: Mapping[str, Any], metric: str) -> Section | None:
    if not found:
        return None

    def worded(key: str) -> str:
        return score(found.get(key), metric)

    text = (
        f"Within {plain(found.get('epsilon'), 2)} of the range of the inputs, {count(found.get('steps'))} steps,"
        f" {count(found.get('examples'))} examples: {metric} {worded('clean_before')} -> {worded('before')} before,"
        f" {worded('clean_after')} -> {worded('after')} after; the attack on the network before leaves the one after"
        f" at {worded('transfer')}."
    )
    return Section("Under attack", [Words(text)])


def _calibration(found: Mapping[str, Any]) -> Section | None:
    if not found:
        return None
    rows = [
        (
            "calibration error, debiased",
            percent(found.get("ece_before"), 2),
            percent(found.get("ece_after"), 2),
        ),
        (
            "mean confidence",
            percent(found.get("confidence_before"), 1),
            percent(found.get("confidence_after"), 1),
        ),
        ("negative log likelihood", plain(found.get("nll_before")), plain(found.get("nll_after"))),
    ]
    note = f"p of the rise of the likelihood's loss: {plain(found.get('nll_p'), 2)}."
    return Section("Calibration", [Table("Calibration", ("", "before", "after"), rows, note=note)])


def _layers(rows: _Rows, metric: str) -> Section | None:
    if not rows:
        return None
    factor, unit = axis_unit(metric)
    shown = rows[:_LISTED]
    cells = [
        (
            named(row.get("layer")),
            plain(row.get("cka"), 3),
            plain(scaled(row.get("alone"), factor), 3),
        )
        for row in shown
    ]
    known = [number(row.get("alone")) or 0.0 for row in shown]
    strong = [known.index(max(known))] if known and max(known) > 0 else []
    columns = ("layer", "alignment", f"drop alone{unit}")
    note = "Alignment of its outputs in both networks (1: the same); drop if only this layer is exchanged."
    if len(rows) > len(shown):
        note += f" The first {len(shown)} of {len(rows)}."
    return Section("Layers", [Table("Layers", columns, cells, strong=strong, note=note)])
