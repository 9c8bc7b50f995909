"""Every figure of a training's page, worked out again from the rows of its record."""

from __future__ import annotations

from typing import Any

import pytest

from karikomi import report
from karikomi.report import training_page
from karikomi.report.record_curves import read_history
from pages import Page


def step(number: int, norm: float | None, loss: float | None, **more: Any) -> dict[str, Any]:
    flags = {"clipped": False, "skipped": False, "factor": 1.0}
    facts = {"step": number, "norm": norm, "loss": loss, "stage": "train"}
    return {"event": "step", **flags, **facts, **more}


LEFT = {"steps": 5, "clipped": 2, "skipped": 1, "norm": 3.0}
ROWS = [
    step(1, 4.0, 2.0, gradients={"top": {"a": 2.0, "b": 3.0}}),
    step(2, 10.0, 1.5, clipped=True, factor=0.5, gradients={"top": {"a": 6.0, "c": 8.0}}),
    {"event": "epoch", "stage": "train", "validation": 0.75, "loss": 9.0},
    step(8, 1.0, 1.0, clipped=True, factor=0.8, left_out=LEFT),
    step(9, None, None, skipped=True, factor=0.0, nonfinite=["a", "c"]),
    step(10, 40.0, 3.0, skipped=True, factor=0.0),
    {"event": "epoch", "stage": "train", "validation": 0.25, "loss": 9.0},
]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(training_page(ROWS, title="One run"))


def test_the_tiles(page: Page) -> None:
    assert page.lead == "4 of 10 steps were clipped (40.0 %), 3 were skipped."
    assert page.tiles == {
        "steps": ("10", ""),
        "clipped": ("40.0 %", ""),
        "skipped": ("3", ""),
        "median norm": ("7", "before clipping"),  # of 1, 4, 10 and 40
        "largest norm": ("40", "before clipping"),
    }


def test_the_tables(page: Page) -> None:
    # Of 16: 4 and 9; of 100: 36 and 64. A tensor that is not among the largest counts as 0.
    shares = [("c", "32.0 %"), ("a", "30.5 %"), ("b", "28.1 %")]
    found = page.tables["Share of the squared gradient norm"]
    assert [(row["tensor"], row["share"]) for row in found] == shares
    assert [[*row.values()] for row in page.tables["What was skipped, and why"]] == [
        ["9", "a, c"],
        ["10", "none: the rule skipped it"],
    ]


def test_only_the_last_skipped_steps_are_listed() -> None:
    page = Page(training_page([step(n, 1.0, 1.0, skipped=True) for n in range(1, 31)]))
    numbers = [int(row["step"]) for row in page.tables["What was skipped, and why"]]
    assert numbers == list(range(19, 31))
    assert "The last 12 of 30." in page.html
    styles = {"after clipping": 2, "before clipping": 0, "skipped (30)": 4}
    assert page.charts["Gradient norm"].styles == styles


def test_the_curves_of_the_page(page: Page) -> None:
    norms = page.charts["Gradient norm"]
    styles = {"after clipping": 2, "before clipping": 0, "clipped (2)": 1, "skipped (2)": 4}
    assert norms.styles == styles
    before, after = norms.values(0, log=True), norms.values(2, log=True)
    assert [x for x, _ in before] == pytest.approx([1, 2, 8, 10], abs=0.02)
    assert [y for _, y in before] == pytest.approx([4, 10, 1, 40], rel=0.01)
    assert [y for _, y in after] == pytest.approx([4, 5, 0.8], rel=0.01)
    marks = [norms.up.value(y, log=True) for _, y in norms.marks(1)[1:]]
    assert marks == pytest.approx([10, 1], rel=0.01), "where the norm was before the clip"
    # A norm that is not finite is marked at the top.
    skipped = [norms.up.value(y, log=True) for _, y in norms.marks(4)[1:]]
    assert skipped == pytest.approx([40, 40], rel=0.01)
    loss = page.charts["Loss"].values()
    assert [x for x, _ in loss] == pytest.approx([1, 2, 8, 10], abs=0.02)
    assert [y for _, y in loss] == pytest.approx([2, 1.5, 1, 3], abs=0.01)
    validation = page.charts["Validation"].values()
    assert [x for x, _ in validation] == pytest.approx([2, 10], abs=0.02)
    assert [y for _, y in validation] == pytest.approx([0.75, 0.25], abs=0.002)


def test_the_curves_of_a_compression_are_in_per_cent_and_in_stages() -> None:
    rows = [dict(row, stage="train") for row in ROWS]
    rows += [dict(row, stage="prune") for row in ROWS]
    result = {"task": "t", "metric": "accuracy", "metric_before": 1, "metric_after": 1}
    page = Page(report.compress_page(result | {"bytes_dense": 2, "bytes_packed": 1}, rows))
    assert "Stages: 1 train (steps 1 to 10), 2 prune (steps 11 to 20)." in page.sentences
    validation = page.charts["Validation"]
    assert [y for _, y in validation.values()] == pytest.approx([75, 25, 75, 25], abs=0.2)
    assert [x for x, _ in validation.values()] == pytest.approx([2, 10, 12, 20], abs=0.03)
    assert "validation accuracy, %" in validation.texts
    assert {"1 train", "2 prune"} <= {*validation.texts}


@pytest.mark.parametrize(("lowest", "log"), [(0.02, False), (0.019, True)])
def test_a_loss_that_falls_far_is_on_a_log_axis(lowest: float, log: bool) -> None:
    page = Page(training_page([step(1, 1.0, 1.0), step(2, 1.0, 0.5), step(3, 1.0, lowest)]))
    chart = page.charts["Loss"]
    assert ("training loss (log scale)" in chart.texts) is log
    assert chart.heights(log=log) == pytest.approx([1.0, 0.5, lowest], rel=0.02, abs=0.003)


def test_a_skipped_step_is_not_clipped_as_well() -> None:
    both = step(1, 3.0, 1.0, clipped=True, skipped=True)
    history = read_history([both, step(2, 2.0, 1.0, clipped=True)])
    assert (history.skipped, history.clipped) == ([(1.0, 3.0)], [(2.0, 2.0)])


EXPLODED = [
    {"event": "names", "gradients": ["0.weight", "4.weight"]},
    step(120, 5.0, 1.0, gradients=[3.0, 4.0]),
    step(121, 352.0, 1.0, gradients=[5.0, 351.96]),
    step(122, 6.0, 1.0, gradients=[6.0, None], left_out={**LEFT, "norm": 400.0}),
    {"event": "names", "gradients": ["0.weight", "2.bias", "4.weight"]},
    step(123, 13.0, 1.0, gradients=[5.0, 12.0, 0.0]),
]


def test_the_tensor_and_the_step_of_the_largest_norm() -> None:
    page = Page(training_page([{k: v for k, v in row.items() if k != "stage"} for row in EXPLODED]))
    assert "The largest norm of a tensor was 352, of 4.weight in step 121." in page.sentences
    rows = [[*row.values()] for row in page.tables["Largest norms of single tensors"]]
    assert rows == [["4.weight", "352", "121"], ["2.bias", "12", "123"], ["0.weight", "6", "122"]]
    assert "A step that the record left out had a norm of 400." in page.html
    # Of 120 and 121 to 123: 0.36, 25 / 352^2, 1 and 25 / 169; a share that is not known counts as 0.
    share = (9 / 25 + 25 / 352**2 + 1 + 25 / 169) / 4
    shares = {r["tensor"]: r["share"] for r in page.tables["Share of the squared gradient norm"]}
    assert shares["0.weight"] == f"{100 * share:.1f} %"


def test_the_terminal_names_them_too() -> None:
    text = report.training_table(EXPLODED).splitlines()
    assert text[0] == "2 of 9 steps were clipped (22.2 %), 1 were skipped."
    assert text[1] == "The largest norm of a tensor was 352, of 4.weight in step 121 (train)."
    assert text[3].split() == ["4.weight", "352", "121", "(train)"]
    assert max(map(len, text)) <= 80
    skipped = report.training_table(ROWS).splitlines()
    assert [line.split() for line in skipped[-2:]] == [
        ["9", "a,", "c"],
        ["10", "none:", "the", "rule", "skipped", "it"],
    ]
