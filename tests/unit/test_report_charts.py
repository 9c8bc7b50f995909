"""The drawing under the pages: scales, ticks, curves from rows, charts, colours."""

from __future__ import annotations

import math
import re
from importlib import resources
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karikomi.report.bars import Bar, Dots, bar_chart, dot_chart
from karikomi.report.charts import Band, line_chart
from karikomi.report.drawing import BROAD, STYLES, Axis, Series, mark
from karikomi.report.record_curves import peaks, read_history, thin
from karikomi.report.scale import fit, tick_text
from karikomi.report.terminal import align
from karikomi.report.wording import change, percent, size

STYLE = (resources.files("karikomi.report") / "templates" / "style.css").read_text(encoding="utf-8")
FINITE = st.floats(-1e12, 1e12)
POSITIVE = st.floats(1e-12, 1e12)
ANY = st.none() | st.floats() | st.integers()


@given(st.lists(FINITE, min_size=1, max_size=20))
def test_linear_scale_holds_all_values_in_order(values: list[float]) -> None:
    scale = fit(values, 50, 800)
    slack = 1e-9 * max(map(abs, values))
    assert scale.low <= min(values) + slack and scale.high >= max(values) - slack
    places = [scale.place(value) for value in sorted(values)]
    assert all(50 <= place <= 800 for place in places if place is not None)
    assert places == sorted(places, key=lambda place: place or 0.0)
    assert scale.high > scale.low


@given(st.lists(POSITIVE, min_size=1, max_size=20))
def test_log_scale_holds_all_values_in_order(values: list[float]) -> None:
    scale = fit(values, 200, 20, log=True)
    assert scale.low <= min(values) * (1 + 1e-6) and scale.high >= max(values) * (1 - 1e-6)
    places = [scale.place(value) for value in sorted(values)]
    assert places == sorted(places, key=lambda place: -(place or 0.0))
    assert scale.place(0.0) is None and scale.place(-1.0) is None


@given(st.lists(FINITE, min_size=1, max_size=5), st.booleans())
def test_ticks_are_few_distinct_and_inside(values: list[float], log: bool) -> None:
    scale = fit([abs(value) for value in values] if log else values, 0, 100, log=log)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12
    assert ticks == sorted(set(ticks))
    room = 1e-6 * max(abs(scale.low), abs(scale.high))
    assert all(scale.low - room <= tick <= scale.high + room for tick in ticks)


@pytest.mark.parametrize(
    ("values", "log", "ticks"),
    [
        ([0.03, 0.97], False, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ([60, 97.5], False, ["60", "70", "80", "90", "100"]),
        ([0.03, 160], True, ["0.01", "0.1", "1", "10", "100", "1,000"]),
        ([1.1, 4.0], True, ["1", "2", "5"]),
        ([5.0], False, ["4.5", "5", "5.5"]),
        ([], False, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
    ],
)
def test_ticks_stand_at_round_numbers(values: list[float], log: bool, ticks: list[str]) -> None:
    assert [tick_text(tick) for tick in fit(values, 0, 1, log=log).ticks()] == ticks


def test_a_long_log_axis_skips_decades() -> None:
    ticks = fit([1e-12, 1e12], 0, 1, log=True).ticks()
    steps = {round(math.log10(after / before)) for before, after in pairwise(ticks)}
    assert len(ticks) <= 7 and len(steps) == 1


def test_bars_start_at_zero() -> None:
    assert fit([90, 95], 0, 1, zero=True).low == 0
    chart = bar_chart("b", "", [Bar("x", 50.0), Bar("y", 100.0)], axis=Axis("%"), high=100.0)
    widths = [float(width) for width in re.findall(r'class="bar"[^>]* width="([\d.]+)"', chart)]
    assert widths[0] / widths[1] == pytest.approx(0.5, abs=0.01)


@given(st.lists(st.none() | FINITE, min_size=1, max_size=300), st.integers(1, 20))
def test_thinning_keeps_extremes_and_order(values: list[float | None], buckets: int) -> None:
    points = [(float(index), value) for index, value in enumerate(values)]
    kept = thin(points, buckets)
    assert len(kept) <= 2 * buckets
    assert kept == sorted(kept, key=lambda point: point[0]) and set(kept) <= set(points)
    seen = [value for value in values if value is not None]
    left = [value for _, value in kept if value is not None]
    assert (min(left), max(left)) == (min(seen), max(seen)) if seen else not left


@given(st.lists(FINITE, min_size=1, max_size=300), st.integers(1, 20))
def test_peaks_keep_the_highest_mark(values: list[float], buckets: int) -> None:
    kept = peaks([(float(index), value) for index, value in enumerate(values)], (0, 299), buckets)
    assert len(kept) <= buckets
    assert max(value for _, value in kept if value is not None) == max(values)


@pytest.mark.parametrize("again", [True, False])
def test_steps_that_begin_again_go_on(again: bool) -> None:
    rows = [
        {"event": "step", "stage": stage, "step": step + (0 if again else first), "loss": 1.0}
        for stage, first, steps in (("train", 0, 3), ("prune", 3, 2))
        for step in range(steps)
    ]
    history = read_history(rows)
    assert [x for x, _ in history.loss] == [0, 1, 2, 3, 4]
    assert [(s.name, s.first, s.last) for s in history.stages] == [
        ("train", 0, 2),
        ("prune", 3, 4),
    ]


def test_stages_of_one_step_stand_side_by_side() -> None:
    rows = [{"event": "step", "stage": stage, "step": 0, "loss": 1.0} for stage in "abc"]
    history = read_history(rows)
    assert [x for x, _ in history.loss] == [0, 1, 2]
    assert [(s.name, s.first, s.last) for s in history.stages] == [
        ("a", 0, 0),
        ("b", 1, 1),
        ("c", 2, 2),
    ]


def test_rows_become_curves() -> None:
    step: dict[str, Any] = {"event": "step", "stage": "train", "loss": 1.0, "factor": 0.5}
    rows = [
        step | {"step": 0, "norm": 4.0, "clipped": True},
        step | {"step": 1, "norm": 1.0, "clipped": False},
        step | {"step": 2, "norm": float("inf"), "clipped": False, "skipped": True},
        {"event": "epoch", "stage": "train", "step": 3, "validation": 0.9},
        {"event": "other", "step": 9},
    ]
    history = read_history(rows)
    assert history.norm == [(0, 4.0), (1, 1.0), (2, None)]
    assert history.after == [(0, 2.0), (1, 0.5), (2, None)]
    assert history.clipped == [(0, 4.0)]
    assert history.skipped == [(2, None)]
    assert history.validation == [(2, 0.9)]


def test_epochs_alone_have_an_axis() -> None:
    rows = [{"event": "epoch", "stage": "train", "validation": 0.5}] * 3
    assert [x for x, _ in read_history(rows).validation] == [0, 1, 2]


def test_a_missing_value_breaks_the_line() -> None:
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 2.0)]
    chart = line_chart("t", "d", [Series("a", points)], x=Axis("x"), y=Axis("y"))
    (path,) = re.findall(r'class="s0" d="([^"]*)"', chart)
    assert path.count("M") == 2 and path.count("L") == 2


@given(st.lists(st.tuples(ANY, ANY), max_size=30), st.booleans(), st.booleans())
def test_every_line_chart_stays_in_its_frame(points: Any, log: bool, marks: bool) -> None:
    series = [Series("a", points, marks=marks), Series("b", points, 7, whiskers=[(0, 1, 2)])]
    chart = line_chart(
        "t", "d", series, x=Axis("x"), y=Axis("y", log=log), bands=[Band("s", "1", 0, 1)]
    )
    _inside(chart)


@given(st.lists(st.tuples(st.text("ab<&", max_size=50), ANY, ANY), max_size=12), st.booleans())
def test_every_row_chart_stays_in_its_frame(rows: Any, log: bool) -> None:
    bars = [Bar(name, value, "note", ghost) for name, value, ghost in rows]
    _inside(bar_chart("t", "d", bars, axis=Axis("x")))
    dots = [Dots(name, values) for name, *values in rows]
    _inside(dot_chart("t", "d", ["before", "after"], dots, axis=Axis("x", log=log)))


def test_a_narrow_stretch_bears_its_number() -> None:
    bands = [Band("train", "1", 0, 90), Band("quantize-0.965-16", "2", 90, 100)]
    chart = line_chart("t", "d", [Series("a", [(0, 1.0)])], x=Axis("x"), y=Axis("y"), bands=bands)
    assert re.findall(r'class="stage"[^>]*>([^<]*)<', chart) == ["1 train", "2"]


def test_marks_of_one_place_do_not_hide_one_another() -> None:
    chart = dot_chart("t", "d", ["a", "b"], [Dots("r", [1.0, 1.0])], axis=Axis("x"))
    circle = re.findall(r'<circle class="m0" cx="[\d.]+" cy="([\d.]+)"', chart)[-1]
    triangle = re.findall(r'class="m1" d="M[\d.]+ ([\d.]+)', chart)[-1]
    # The triangle begins at its tip, four pixels above its middle.
    assert float(triangle) + 4 - float(circle) == pytest.approx(5.0, abs=0.2)


def test_styles_differ_without_colour() -> None:
    shapes = {re.sub(r"m\d", "", mark(50, 50, style)) for style in range(STYLES)}
    assert len(shapes) == STYLES
    dashes = re.findall(r"\.s\d \{ stroke-dasharray: ([^;]+);", STYLE)
    assert len(set(dashes)) == len(dashes) == STYLES - 1


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_the_paper(theme: int) -> None:
    block = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[theme]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
    for name in ("ink", "quiet"):
        assert min(_contrast(colours[name], colours[p]) for p in ("paper", "soft")) >= 4.5
    assert _contrast(colours["warn"], colours["warn-soft"]) >= 4.5
    for style in range(STYLES):
        assert min(_contrast(colours[f"c{style}"], colours[p]) for p in ("paper", "soft")) >= 3


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (size(0), "0 B"),
        (size(999.6), "1.00 kB"),
        (size(9_996), "10.0 kB"),
        (size(5e15), "5000 TB"),
        (size(10**400), "n/a"),
        (percent(1), "100.0 %"),
        (change(-0.00004, "accuracy"), "0.00 points"),
        (change(0.0, "loss"), "0"),
    ],
)
def test_wording_at_the_edges(said: str, text: str) -> None:
    assert said == text


@given(st.lists(st.tuples(st.text(max_size=120), st.text(max_size=9)), min_size=1, max_size=6))
def test_aligned_lines_fit_and_end_together(rows: list[tuple[str, str]]) -> None:
    lines = align([(name, f"{number}|") for name, number in rows])
    assert len({len(line) for line in lines}) == 1
    assert max(map(len, lines)) <= 80


def test_names_are_shortened_no_more_than_needed() -> None:
    (line,) = align([["a" * 30, "b" * 26, "1.25"]], left=2, width=50)
    assert len(line) == 50 and line.endswith("  1.25")


def _inside(chart: str) -> None:
    assert "nan" not in chart and "inf" not in chart
    height = float(re.findall(r'viewBox="0 0 \d+ ([\d.]+)"', chart)[0])
    for path in re.findall(r' d="([^"]*)"', chart):
        for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path):
            assert -8 <= float(x) <= BROAD + 8 and -8 <= float(y) <= height + 8
    for x, width in re.findall(r'<rect[^>]* x="(-?[\d.]+)"[^>]* width="(-?[\d.]+)"', chart):
        assert float(x) >= 0 and float(width) >= 0 and float(x) + float(width) <= BROAD


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        red, green, blue = (
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
