"""The page and the terminal view of a sweep over limits and sparsities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from karikomi.report.charts import line_chart
from karikomi.report.compress_view import environment_section
from karikomi.report.drawing import STYLES, Axis, Series, drawn
from karikomi.report.page import Chart, Page, Part, Section, Table, Tile, Words, render
from karikomi.report.result_checks import named, records, require, table, warning_texts
from karikomi.report.terminal import align, printable, text_block, warning_lines
from karikomi.report.verdict import lower_is_better
from karikomi.report.wording import (
    MISSING,
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
_NEEDED = ("task", "metric", "points")
_Points = Sequence[Mapping[str, Any]]


def sweep_page(result: Mapping[str, Any]) -> str:
    """Return the HTML page of a sweep: a plot with whiskers and a table for each quantity.

    A point that is missing or has no value is shown as "n/a"; a result without points raises
    `InvalidArgument` only if the key itself is missing.

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
    sections = _sections(points, metric) if points else [Section("Points", [Words("No points.")])]
    sections.append(environment_section(table(result.get("environment"))))
    title = f"{named(result['task'])}: limits and sparsities"
    tiles = _tiles(points, metric, lower_is_better(result))
    return render(Page(title, lead, tiles, sections, warnings=warning_texts(result)))


def sweep_table(result: Mapping[str, Any]) -> str:
    """Return one line per point for a terminal, in 80 columns; ``*`` marks the best mean.

    Warnings stand above it, and none is cut.

    >>> point = {"limit": None, "sparsity": 0.5, "runs": 1, "accuracy": {"mean": 0.9}}
    >>> print(sweep_table({"task": "t", "metric": "accuracy", "points": [point]}).splitlines()[1])
    none     50 %     1  90.00 % *       n/a      n/a  n/a      n/a   n/a
    """
    result = require(result, _NEEDED, where="sweep_table")
    points = records(result["points"], "points", where="sweep_table")
    metric, lower = named(result["metric"]), lower_is_better(result)
    best = _best(points, lower)
    # Not None, which is the mean of a point without one.
    top = math.nan if best is None else _mean(best, "accuracy")
    head = ("limit", "sparse", "runs", metric, "min..max", "clipped", "gap", "ms/step")
    rows: list[tuple[str, ...]] = [(*head, "size")]
    for point in sorted(points, key=_order):
        seen = table(point.get("accuracy"))
        low, high = score(seen.get("min"), metric), score(seen.get("max"), metric)
        rows.append(
            (
                _limit(point.get("limit")),
                _sparsity(point.get("sparsity")),
                count(point.get("runs")),
                score(seen.get("mean"), metric)
                + (" *" if _mean(point, "accuracy") == top else "  "),
                (low if low == high else f"{low}..{high}").replace(" %", ""),
                percent(_mean(point, "clipped"), 0),
                plain(_mean(point, "gap"), 2),
                plain(_mean(point, "ms_per_step"), 3),
                size(_mean(point, "bytes")),
            )
        )
    warnings = warning_lines(warning_texts(result))
    if not points:
        return text_block([f"{printable(result['task'])}: no points", *warnings])
    note = NOTE.format("lowest" if lower else "highest")
    return text_block([*warnings, *align(rows), "", note])


def _sections(points: _Points, metric: str) -> list[Section]:
    factor, end = axis_unit(metric)
    tables: list[Part] = [
        _grid(points, "gap", "Generalization gap", lambda v: score(v, metric)),
        _grid(points, "clipped", "Share of steps that were clipped", lambda v: percent(v, 1)),
        _grid(points, "ms_per_step", "Milliseconds a step", lambda v: plain(v, 3)),
        _grid(points, "bytes", "Bytes of the file", size),
    ]
    by_limit: list[Part] = [
        *_charts(
            points, "accuracy", f"{metric} on the test split by limit", (factor, metric + end)
        ),
        _grid(points, "accuracy", f"{metric} on the test split", lambda v: score(v, metric)),
        *_charts(points, "clipped", "Clipped steps by limit", (100.0, "steps clipped, %")),
    ]
    return [Section("Limits and sparsities", by_limit), Section("What it costs", tables)]


def _charts(points: _Points, key: str, title: str, unit: tuple[float, str]) -> list[Chart]:
    # More lines than styles would not be distinguishable in one chart.
    sparsities = _values(points, "sparsity")
    parts = [sparsities[first : first + STYLES] for first in range(0, len(sparsities), STYLES)]
    names = [title] if len(parts) == 1 else [f"{title}, part {k + 1}" for k in range(len(parts))]
    return [_chart(points, key, name, unit, part) for name, part in zip(names, parts, strict=True)]


def _chart(
    points: _Points,
    key: str,
    title: str,
    unit: tuple[float, str],
    sparsities: Sequence[float | None],
) -> Chart:
    limits = _values(points, "limit")
    series = []
    for style, sparsity in enumerate(sparsities):
        # Slightly shifted, so that whiskers of one limit do not overlap.
        shift = 0.08 * (style - (len(sparsities) - 1) / 2)
        of_line = [_find(points, limit, sparsity) for limit in limits]
        stats = [table(point.get(key)) for point in of_line]
        ends = [[scaled(stat.get(key), unit[0]) for key in _STATS] for stat in stats]
        series.append(
            Series(
                f"sparsity {_sparsity(sparsity)}",
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
            names=[_limit(limit) for limit in limits],
        )
    )
    return Chart(title, svg, "Points are means over seeds; whiskers are lowest and highest run.")


def _grid(points: _Points, key: str, caption: str, wording: Callable[[Any], str]) -> Table:
    sparsities = _values(points, "sparsity")
    rows = [
        (
            _limit(limit),
            *(spread(_find(points, limit, sparsity).get(key), wording) for sparsity in sparsities),
        )
        for limit in _values(points, "limit")
    ]
    columns = ("limit", *(f"sparsity {_sparsity(sparsity)}" for sparsity in sparsities))
    return Table(caption, columns, rows, note="Mean (lowest to highest).")


def _tiles(points: _Points, metric: str, lower: bool) -> list[Tile]:
    best = _best(points, lower)
    if best is None:
        return []
    where = f"limit {_limit(best.get('limit'))}, sparsity {_sparsity(best.get('sparsity'))}"
    return [Tile(f"best mean {metric}", score(_mean(best, "accuracy"), metric), where)]


_STATS = ("min", "mean", "max")


def _best(points: _Points, lower: bool) -> Mapping[str, Any] | None:
    means = [(_mean(point, "accuracy"), point) for point in points]
    seen = [(mean, point) for mean, point in means if mean is not None]
    choose = min if lower else max
    return choose(seen, key=lambda pair: pair[0])[1] if seen else None


def _mean(point: Mapping[str, Any], key: str) -> float | None:
    return number(table(point.get(key)).get("mean"))


def _limit(limit: Any) -> str:
    return "none" if limit is None else MISSING if number(limit) is None else plain(limit)


def _sparsity(sparsity: Any) -> str:
    # All digits: of 0.99 and 0.995 neither is 100 %, nor are they the same column.
    share = scaled(sparsity, 100)
    return MISSING if share is None else f"{share:.6g} %"


def _order(point: Mapping[str, Any]) -> tuple[float, float]:
    limit, sparsity = number(point.get("limit")), number(point.get("sparsity"))
    return math.inf if limit is None else limit, math.inf if sparsity is None else sparsity


def _values(points: _Points, key: str) -> list[float | None]:
    seen = {number(point.get(key)) for point in points}
    finite = sorted(value for value in seen if value is not None)
    return [*finite, None] if None in seen else [*finite]


def _find(points: _Points, limit: float | None, sparsity: float | None) -> Mapping[str, Any]:
    wanted = (limit, sparsity)
    matches = (p for p in points if (number(p.get("limit")), number(p.get("sparsity"))) == wanted)
    return next(matches, {})
