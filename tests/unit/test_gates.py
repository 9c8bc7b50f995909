"""Gates on an audit: what fails, what passes, and what cannot be decided."""

from __future__ import annotations

from typing import Any

import pytest

from karikomi.audit.gates import as_rows, gates, verdict_of
from karikomi.errors import InvalidArgument, UnknownName

RESULT: dict[str, Any] = {
    "metric_before": 0.75,
    "metric_after": 0.5,
    "goal": "max",
    "agreement": 0.875,
    "classes": [{"before": 1.0, "after": 0.5}, {"before": 0.5, "after": 0.75}],
    "noise": [{"before": 0.75, "after": 0.25}, {"before": 0.5, "after": None}],
}


@pytest.mark.parametrize(
    ("figure", "value"),
    [("drop", 0.25), ("changed", 0.125), ("class_drop", 0.5), ("noise_drop", 0.5)],
)
def test_each_figure_fails_above_its_limit(figure: str, value: float) -> None:
    over, at, least = gates(
        RESULT, [f"{figure}>{value / 2}", f"{figure} > {value}", f"{figure}>={value}"]
    )
    assert [gate.value for gate in (over, at, least)] == [value] * 3
    assert [gate.passed for gate in (over, at, least)] == [False, True, False]


def test_an_error_drops_when_it_rises() -> None:
    result = {"metric_before": 0.5, "metric_after": 0.75, "goal": "min"}
    assert gates(result, ["drop > 0.2"])[0].passed is False
    assert gates({**result, "goal": "max"}, ["drop > 0.2"])[0].passed is True


def test_what_was_not_measured_is_not_green() -> None:
    empty = {"metric_before": 0.5, "metric_after": None, "agreement": None, "classes": []}
    tried = gates(empty, ["drop>0", "changed>0", "class_drop>0", "noise_drop>0"])
    assert [gate.passed for gate in tried] == [None] * 4
    assert verdict_of(tried) == "undecided"
    assert verdict_of([*tried, *gates(RESULT, ["drop>0"])]) == "missed"
    assert verdict_of(gates(RESULT, ["drop>0.3"])) == verdict_of([]) == "held"
    assert as_rows(gates(RESULT, ["drop>0.3"])) == [
        {"condition": "drop>0.3", "value": 0.25, "passed": True}
    ]


@pytest.mark.parametrize("text", ["", "drop", "drop<1", "drop>", "drop>--1", "> 3", "drop > 1 2"])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="a gate is a figure"):
        gates(RESULT, [text])


def test_an_unknown_figure_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="class_drop"):
        gates(RESULT, ["clas_drop>1"])
