"""The page of one training: drawn from the rows of a record alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import karikomi as kk
from karikomi.report import TrainingPage, training_page
from karikomi.rules.outcome import Outcome


def step(number: int, norm: float | None, **more: Any) -> dict[str, Any]:
    return {"event": "step", "step": number, "norm": norm, "factor": 1.0, "clipped": False, **more}


def test_a_page_counts_what_was_left_out_of_the_record_too() -> None:
    left = {"steps": 7, "clipped": 2, "skipped": 1, "norm": 9.0}
    rows = [
        step(1, 2.0, loss=1.0),
        step(9, 4.0, clipped=True, factor=0.5, left_out=left, loss=0.5),
        step(10, None, skipped=True, factor=0.0, nonfinite=["head/kernel"], loss=None),
    ]
    page = training_page(iter(rows), title="One run")
    assert (
        "<h1>One run</h1>" in page
        and "3 of 10 steps were clipped (30.0 %), 2 were skipped." in page
    )
    assert "head/kernel" in page and "<script" not in page
    assert page.count("<svg") == 4  # norms and loss, broad and narrow; no validation


def test_shares_are_those_of_the_joint_norm() -> None:
    top = {"tensors": 3, "top": {"a": 3.0, "b": 4.0}, "quantiles": []}
    rows = [step(n, 5.0, gradients=top) for n in (1, 2)]
    page = training_page(rows)
    assert page.index(">b<") < page.index(">a<") and "64.0 %" in page and "36.0 %" in page
    # Largest entries have no joint norm, and no shares of one.
    assert "Contributions" not in training_page([step(1, 4.0, gradients=top)])


@pytest.mark.parametrize(
    "rows", [[], [{"event": "start", "schema": 1}], [{"event": "epoch", "validation": 1.0}]]
)
def test_a_record_without_steps_says_so_or_draws_what_there_is(rows: list[dict[str, Any]]) -> None:
    page = training_page(rows)
    assert ("No steps were recorded" in page) == (not any(row["event"] == "epoch" for row in rows))


def test_a_hostile_row_is_only_text() -> None:
    row = step(1, math.inf, skipped=True, nonfinite=["<script>x</script>"], gradients={"top": 3})
    assert "<script>" not in training_page([row])


def test_a_recorded_run_is_drawn_into_its_file(tmp_path: Path) -> None:
    with kk.record.Recorder(tmp_path / "run.jsonl") as recorder:
        for number, norm in enumerate((1.0, 3.0, 5.0)):
            outcome = Outcome(("a", "b"), [norm, 0.0], [min(norm, 2.0), 0.0], skipped=False)
            recorder.step(number, outcome)
    page = TrainingPage(tmp_path / "page.html")
    assert page(kk.record.read(tmp_path / "run.jsonl")) == tmp_path / "page.html"
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "2 of 3 steps were clipped" in text and "100.0 %" in text


def test_rows_are_read_once_and_not_kept() -> None:
    passed: list[int] = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(1000):
            passed.append(number)
            yield step(number, 1.0 + number)

    assert "1,000" in training_page(rows())
    assert passed == list(range(1000))
