"""The page and the terminal view of a sweep over clips, bounds, learning rates, sparsities and bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from karikomi.report.charts import line_chart
from karikomi.report.compress_view import environment_section
from karikomi.report.drawing import STYLES, Axis, Series, drawn
from karikomi.report.page import Chart, Page, Part, Points, Section, Table, Tile, Words, render
from karikomi.report.result_checks import named, records, require, table, warning_texts
from karikomi.report.sweep_axes import (
    clip_name,
    clips_of,
    column_name,
    columns_of,
    find,
    mean_of,
    order,
    setting_name,
)
from karikomi.report.sweep_front import front_chart
from karikomi.report.terminal import WIDTH, align, printable, text_block, warning_lines, wrap
from karikomi.report.verdict import lower_is_better
from karikomi.report.wording import (
    axis_unit,
    count,
    number,
    percent,
    plain,
    scaled,
    score,
    size,
    spread,
)

NOTE = "* {} mean on the test split: choosing by it is choosing on test data"
CHOSEN = "* chosen on the validation split; {} and min..max are of the test split"
_NEEDED = ("task", "metric", "points")
_Points = Sequence[Mapping[str, Any]]


def sweep_page(result: Mapping[str, Any]) -> str:
    """Return the HTML page of a sweep: the answer, a plot with whiskers, and a table for each quantity.

    A point that is missing or has no value is shown as "n/a"; a result without points raises
    `InvalidArgument` only if the key itself is missing. Results of earlier versions have no answer.

    >>> point = {"limit": 1.0, "sparsity": 0.5, "runs": 1,
    ...          "accuracy": {"mean": 0.9, "min": 0.9, "max": 0.9}}
    >>> "90.00 %" in sweep_page({"task": "digits", "metric": "accuracy", "points": [point]})
    True
    """
    result = require(result, _NEEDED, where="sweep_page")
    points = records(result["points"], "points", where="sweep_page")
    metric = named(result["metric"])
    seeds = result.get("seeds")
    lead = f"{len(points)} settings" + (
        f", seeds {', '.join(map(named, seeds))}." if isinstance(seeds, list | tuple) else "."
    )
    said = answer_sentences(result)
    sections = [Section("Answer", _answer(said))] if said else []
    sections += _sections(points, metric) if points else [Section("Points", [Words("No points.")])]
    sections.append(environment_section(table(result.get("environment"))))
    title = f"{named(result['task'])}: limits and sparsities"
    tiles = _tiles(points, metric, lower_is_better(result))
    return render(Page(title, lead, tiles, sections, warnings=warning_texts(result)))


def sweep_table(result: Mapping[str, Any]) -> str:
    """Return the answer and one line per point for a terminal, in 80 columns; ``*`` marks what was chosen.

    Without an answer it marks the best mean. Warnings stand first, and none is cut.

    >>> point = {"limit": None, "sparsity": 0.5, "runs": 1, "accuracy": {"mean": 0.9}}
    >>> print(sweep_table({"task": "t", "metric": "accuracy", "points": [point]}).splitlines()[1])
    none     50 %     1  90.00 % *       n/a      n/a  n/a      n/a   n/a
    """
    result = require(result, _NEEDED, where="sweep_table")
    points = records(result["points"], "points", where="sweep_table")
    metric, lower = named(result["metric"]), lower_is_better(result)
    marked = _marked(points, lower)
    head = ("limit", "sparse", "runs", metric, "min..max", "clipped", "gap", "ms/step", "size")
    rows: list[tuple[str, ...]] = [head]
    for point in sorted(points, key=order):
        seen = table(point.get("accuracy"))
        low, high = score(seen.get("min"), metric), score(seen.get("max"), metric)
        star = any(point is other for other in marked)
        rows.append(
            (
                setting_name(point),
                _sparsity_and_bits(point),
                count(point.get("runs")),
                score(seen.get("mean"), metric) + (" *" if star else "  "),
                (low if low == high else f"{low}..{high}").replace(" %", ""),
                percent(mean_of(point, "clipped"), 0),
                plain(mean_of(point, "gap"), 2),
                plain(mean_of(point, "ms_per_step"), 3),
                size(mean_of(point, "bytes")),
            )
        )
    warnings = warning_lines(warning_texts(result))
    if not points:
        return text_block([f"{printable(result['task'])}: no points", *warnings])
    said = [line for text in answer_sentences(result) for line in wrap(printable(text))]
    note = NOTE.format("lowest" if lower else "highest")
    note = CHOSEN.format(metric) if said else note
    return text_block([*warnings, *said, *([""] if said else []), *_fitting(rows), "", note])


def _fitting(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the rows as lines; where long names would be cut, columns that the page has too are left out."""
    kept = [*rows]
    for column in ("min..max", "gap", "ms/step"):
        if sum(max(len(row[k]) for row in kept) + 2 for k in range(len(kept[0]))) - 2 <= WIDTH:
            break
        place = kept[0].index(column)
        kept = [(*row[:place], *row[place + 1 :]) for row in kept]
    return align(kept)


def _answer(said: Sequence[str]) -> list[Part]:
    """Return the sentences as parts: of each sparsity and bits the first as a paragraph, the others as points."""
    parts: list[Part] = []
    points: list[str] = []
    for place, text in enumerate(said):
        if place == 0 or text.startswith("sparsity "):
            parts += [Points(points)] if points else []
            points = []
            parts.append(Words(text))
        else:
            points.append(text)
    return [*parts, *([Points(points)] if points else [])]


def answer_sentences(result: Mapping[str, Any]) -> list[str]:
    """Return the sentences of the answer, none of an earlier version's result."""
    said = table(result.get("answer")).get("sentences")
    return [named(text) for text in said] if isinstance(said, list | tuple) else []


def _sections(points: _Points, metric: str) -> list[Section]:
    factor, end = axis_unit(metric)

    def scores(value: Any) -> str:
        return score(value, metric)

    parts: list[Part] = [
        *_charts(
            points, "accuracy", f"{metric} on the test split by limit", (factor, metric + end)
        ),
        _grid(points, "accuracy", f"{metric} on the test split", scores),
        *_known(points, "validation", f"{metric} on the validation split", scores),
        *_verdicts(points),
        *_charts(points, "clipped", "Clipped steps by limit", (100.0, "steps clipped, %")),
    ]
    training: list[Part] = [
        _grid(points, "gap", "Generalization gap", scores),
        *_known(points, "loss", "Loss of the last epoch", plain),
        *_known(points, "epochs_to_target", "Epochs to the target", lambda v: plain(v, 3)),
        *_known(points, "seconds_to_target", "Seconds to the target", lambda v: plain(v, 3)),
        _grid(points, "clipped", "Share of steps that were clipped", lambda v: percent(v, 1)),
        *_known(points, "skipped", "Share of steps that were skipped", lambda v: percent(v, 1)),
    ]
    tables: list[Part] = [
        _grid(points, "ms_per_step", "Milliseconds a step", lambda v: plain(v, 3)),
        _grid(points, "bytes", "Bytes of the file", size),
        *_known(points, "macs", "Multiply-accumulates of one example", count),
        *_known(
            points, "ms", "Milliseconds of a forward pass on 64 examples", lambda v: plain(v, 3)
        ),
    ]
    sections = [Section("Limits and sparsities", parts), Section("Training", training)]
    front = front_chart(points, metric)
    costs = [*([front] if front is not None else []), *tables]
    return [*sections, Section("What it costs", costs)]


def _charts(points: _Points, key: str, title: str, unit: tuple[float, str]) -> list[Chart]:
    # More lines than styles would not be distinguishable in one chart.
    columns = columns_of(points)
    parts = [columns[first : first + STYLES] for first in range(0, len(columns), STYLES)]
    names = [title] if len(parts) == 1 else [f"{title}, part {k + 1}" for k in range(len(parts))]
    return [_chart(points, key, name, unit, part) for name, part in zip(names, parts, strict=True)]


def _chart(
    points: _Points,
    key: str,
    title: str,
    unit: tuple[float, str],
    columns: Sequence[Mapping[str, Any]],
) -> Chart:
    clips = clips_of(points)
    series = []
    for style, column in enumerate(columns):
        # Slightly shifted, so that whiskers of one limit do not overlap.
        shift = 0.08 * (style - (len(columns) - 1) / 2)
        of_line = [find(points, clip, column) for clip in clips]
        stats = [table(point.get(key)) for point in of_line]
        ends = [[scaled(stat.get(key), unit[0]) for key in _STATS] for stat in stats]
        series.append(
            Series(
                column_name(column),
                [(slot + shift, mean) for slot, (_, mean, _) in enumerate(ends)],
                style,
                marks=True,
                whiskers=[(slot + shift, low, high) for slot, (low, _, high) in enumerate(ends)],
            )
        )
    svg = drawn(
        lambda: line_chart(
            title,
            "One line for each sparsity; points are means, whiskers reach from the lowest to the"
            " highest run.",
            series,
            x=Axis("limit of the gradient norm"),
            y=Axis(unit[1]),
            names=[clip_name(clip) for clip in clips],
        )
    )
    return Chart(title, svg, "Points are means over seeds; whiskers are lowest and highest run.")


def _grid(points: _Points, key: str, caption: str, wording: Callable[[Any], str]) -> Table:
    columns = columns_of(points)
    rows = [
        (
            clip_name(clip),
            *(spread(find(points, clip, column).get(key), wording) for column in columns),
        )
        for clip in clips_of(points)
    ]
    names = ("limit", *map(column_name, columns))
    return Table(caption, names, rows, note="Mean (lowest to highest).")


def _known(points: _Points, key: str, caption: str, wording: Callable[[Any], str]) -> list[Table]:
    """Return the table of a quantity, where any point has it: results of earlier versions do not."""
    seen = any(number(table(point.get(key)).get("mean")) is not None for point in points)
    return [_grid(points, key, caption, wording)] if seen else []


def _verdicts(points: _Points) -> list[Table]:
    if not any("verdict" in point for point in points):
        return []
    columns = columns_of(points)
    rows = [
        (clip_name(clip), *(_verdict(find(points, clip, column)) for column in columns))
        for clip in clips_of(points)
    ]
    names = ("limit", *map(column_name, columns))
    note = "Each against the best of its sparsity and bits; runs that diverged of all."
    return [Table("Verdicts", names, rows, note=note)]


def _verdict(point: Mapping[str, Any]) -> str:
    runs, lost = number(point.get("runs")), number(point.get("diverged"))
    text = named(point.get("verdict"))
    if not lost or runs is None:
        return text
    return f"{text}\n({count(lost)} of {count(runs + lost)} diverged)"


def _tiles(points: _Points, metric: str, lower: bool) -> list[Tile]:
    chosen = [point for point in points if point.get("verdict") == "chosen"]
    # The whole network first.
    chosen.sort(key=lambda p: (number(p.get("sparsity")) or 0.0, number(p.get("bits")) or math.inf))
    if chosen:
        return [
            Tile(
                f"chosen, {column_name(point)}",
                f"limit {setting_name(point)}",
                _chosen(point, metric),
            )
            for point in chosen[:3]
        ]
    best = _best(points, lower)
    if best is None:
        return []
    where = f"limit {clip_name(best)}, {column_name(best)}"
    return [Tile(f"best mean {metric}", score(mean_of(best, "accuracy"), metric), where)]


def _chosen(point: Mapping[str, Any], metric: str) -> str:
    return f"{metric} {score(mean_of(point, 'accuracy'), metric)} on the test split"


_STATS = ("min", "mean", "max")


def _marked(points: _Points, lower: bool) -> list[Mapping[str, Any]]:
    """Return what was chosen; of an earlier version's result the best means."""
    if any("verdict" in point for point in points):
        return [point for point in points if point.get("verdict") == "chosen"]
    best = _best(points, lower)
    # Not None, which is the mean of a point without one.
    top = math.nan if best is None else mean_of(best, "accuracy")
    return [point for point in points if mean_of(point, "accuracy") == top]


def _best(points: _Points, lower: bool) -> Mapping[str, Any] | None:
    means = [(mean_of(point, "accuracy"), point) for point in points]
    seen = [(mean, point) for mean, point in means if mean is not None]
    choose = min if lower else max
    return choose(seen, key=lambda pair: pair[0])[1] if seen else None


def _sparsity_and_bits(point: Mapping[str, Any]) -> str:
    name = column_name({"sparsity": point.get("sparsity"), "bits": point.get("bits")})
    return name.removeprefix("sparsity ")
