"""The account of a shrink: whether it is faster and why not, what it cost, what went and what stayed."""

from __future__ import annotations

import dataclasses
import re
import time

import pytest
import torch

import karikomi as kk
from karikomi.shrink import ShrinkReport
from karikomi.shrink.account import Refit
from karikomi.torch.shrinking.costs import in_turn

WHOLE = ShrinkReport(
    widths_before={"a": 64, "b": 48, "head": 5},
    widths_after={"a": 32, "b": 48, "head": 5},
    parameters_before=40_000,
    parameters_after=10_000,
    left_alone={"b": "unit 3 is constant, but c pads"},
    max_difference=2e-7,
    macs_before=8_000,
    macs_after=2_000,
    ms_before=3.0,
    ms_after=2.0,
    frozen={"head": "its units are outputs of the network"},
    together={"a.weight": ["add at net.py:7"], "b.weight": ["mul at net.py:9"]},
    members={
        "a.weight": ["a.weight, axis 0", "n.weight, axis 0"],
        "b.weight": ["b.weight, axis 0"],
    },
    statistics=["group_norm at net.py:8"],
    literals=["view at net.py:3: 64 -> 32"],
    form="graph",
    kept={"a.weight": {0: [1, 2]}},
)


def test_uneven_widths_are_a_hint_where_the_time_fell_less_than_the_work() -> None:
    uneven = dataclasses.replace(WHOLE, widths_after={"a": 31, "b": 48, "head": 5})
    assert WHOLE.hint == ""
    assert uneven.hint == (
        "Kernels are slower at uneven widths (1 layer, such as a: 64 -> 31): try multiple_of=8."
    )
    assert str(uneven).splitlines()[1] == uneven.as_dict()["hint"] == uneven.hint
    assert dataclasses.replace(uneven, ms_after=0.7).hint == ""
    assert dataclasses.replace(uneven, ms_after=None).hint == ""
    narrow = dataclasses.replace(
        uneven, widths_before={"a": 16, "b": 64}, widths_after={"a": 7, "b": 30}
    )
    assert "2 layers, such as b: 64 -> 30): try multiple_of=4" in narrow.hint
    # A width that was uneven before says nothing.
    assert dataclasses.replace(uneven, widths_before={"a": 63, "b": 48, "head": 5}).hint == ""


def test_the_account_as_text() -> None:
    assert str(WHOLE).splitlines() == [
        "1.50x faster: 3.00 -> 2.00 ms.",
        "",
        "                      before   after",
        "parameters            40,000  10,000  25.0%",
        "multiply-accumulates   8,000   2,000  25.0%",
        "milliseconds               3       2  66.7%",
        "",
        "layer  units  after",
        "a         64     32",
        "",
        "Went together:",
        "  a.weight, axis 0 with n.weight, axis 0: add at net.py:7",
        "",
        "Stayed:",
        "  head: its units are outputs of the network",
        "  b: unit 3 is constant, but c pads",
        "",
        "Fewer entries in the statistics of:",
        "  group_norm at net.py:8",
        "",
        "An exported graph, since the code has the old sizes at:",
        "  view at net.py:3: 64 -> 32",
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"ms_after": 2.86},
            r"Not faster \(3 -> 2.86 ms\): the multiply-accumulates fell by 75%, but",
        ),
        ({"ms_after": 2.85}, "1.05x faster: 3.00 -> 2.85 ms."),
        ({"ms_after": 3.5, "macs_after": 8_000}, "the multiply-accumulates are as many as before"),
        (
            {
                "ms_after": 2.0,
                "widths_after": WHOLE.widths_before,
                "parameters_after": WHOLE.parameters_before,
            },
            r"no unit was removed, though a could lose some \(unit 3 is constant",
        ),
        ({"ms_after": None}, "The time was not measured."),
    ],
)
def test_what_is_not_faster_is_said_first_with_the_reason(changes: dict, says: str) -> None:
    report = dataclasses.replace(WHOLE, **changes)
    assert re.search(says, str(report).splitlines()[0])
    assert report.as_dict()["verdict"] == report.verdict


def test_what_was_re_fitted_is_said() -> None:
    layers = {"a": Refit(0.5, 0.1, kept=True), "b": Refit(0.1, 0.2), "c": Refit(why="masked")}
    report = dataclasses.replace(WHOLE, compensation={"": Refit(0.5, 0.25, kept=True), **layers})
    assert "Re-fitted: 1 of 3 layers; the whole network on held-out data: 0.5 -> 0.25." in str(
        report
    )
    assert "Not re-fitted:\n  c: masked" in str(report)
    report = dataclasses.replace(WHOLE, compensation={"": Refit(0.5, 0.75), **layers})
    assert (
        "Nothing is re-fitted: on held-out data the whole network is no better (0.5 -> 0.75)."
        in str(report)
    )


def test_long_lists_are_cut_in_the_text_only() -> None:
    many = {f"l{number}": 2 for number in range(20)}
    halved = dict.fromkeys(many, 1)
    report = dataclasses.replace(WHOLE, widths_before=many, widths_after=halved)
    assert "and 8 layers" in str(report) and "l12" not in str(report)
    assert len(report.as_dict()["widths_after"]) == 20


def test_networks_are_timed_in_turn_and_given_back_as_they_were() -> None:
    calls: list[tuple[str, bool]] = []

    class Slow(torch.nn.Module):
        def __init__(self, name: str, seconds: float) -> None:
            super().__init__()
            self.name, self.seconds, self.inner = name, seconds, torch.nn.Dropout()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append((self.name, self.inner.training))
            time.sleep(self.seconds)
            return x

    before, after = Slow("before", 0.02), Slow("after", 0.001).eval()
    first, second = in_turn(before, after, (torch.zeros(1),), {}, most=4)
    assert calls == [("before", False), ("after", False)] * 5
    assert first >= 20 and first > second >= 1
    assert before.training and before.inner.training and not after.training
    calls.clear()
    in_turn(before, after, (torch.zeros(1),), {}, seconds=0.0)
    assert len(calls) == 2 * 4


def test_a_shrink_says_what_it_measured_and_what_went_together() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    _, report = kk.torch.shrink(net, torch.randn(2, 4), width=0.5)
    assert report.ms_before and report.ms_after
    assert report.members == {
        "0.weight": ["0.weight, axis 0", "0.bias, axis 0", "2.weight, axis 1"]
    }
    assert (report.macs_before, report.macs_after) == (2 * 48, 2 * 24)
    assert "  0.weight, axis 0 with 0.bias, axis 0, 2.weight, axis 1: linear" in str(report)
