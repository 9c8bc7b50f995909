"""Every figure of an audit, worked out again: labels that are not places, unequal classes, inputs times ten."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from karikomi import report
from karikomi.audit import audit, robustness
from karikomi.audit.alarms import alarms
from karikomi.audit.predictions import LISTED, Predictions
from karikomi.tasks import Data, Split, Task
from pages import Page

# Class: its true examples, and the predictions before and after; the classes have gaps and unequal sizes.
EXAMPLES = (
    [(3, 3, 3)] * 5 + [(3, 3, 7), (3, 5, 3), (3, 5, 7)]  # 8 of class 3: 6 right, then 6
    + [(5, 5, 5), (5, 5, 9)]  # 2 of class 5: 2, then 1
    + [(9, 3, 9), (9, 3, 9), (9, 9, 9), (9, 9, 3), (9, 7, 7)]  # 5 of class 9: 2, then 3
)  # fmt: skip


def _lost_to(label: str) -> dict[str, Any]:
    return {"became": label, "became_examples": 1}


def test_classes_go_by_their_label_and_changes_by_their_place() -> None:
    facts = Predictions(*np.array(EXAMPLES).T).facts()
    assert facts["classes"] == [
        {
            "class": "3",
            "examples": 8,
            "before": 6 / 8,
            "after": 6 / 8,
            "predicted": [8, 7],
            **_lost_to("7"),
        },
        {
            "class": "5",
            "examples": 2,
            "before": 1.0,
            "after": 0.5,
            "predicted": [4, 1],
            **_lost_to("9"),
        },
        {
            "class": "9",
            "examples": 5,
            "before": 2 / 5,
            "after": 3 / 5,
            "predicted": [2, 4],
            **_lost_to("3"),
        },
    ]
    assert (facts["changed"], facts["lost"], facts["gained"]) == (7, 3, 3)
    assert facts["agreement"] == pytest.approx(8 / 15)
    assert [(row["index"], row["label"], row["before"], row["after"]) for row in facts["changed_examples"]] == [
        (5, "3", "3", "7"), (9, "5", "5", "9"), (13, "9", "9", "3"),  # lost
        (6, "3", "5", "3"), (10, "9", "3", "9"), (11, "9", "3", "9"),  # gained
        (7, "3", "5", "7"),  # wrong both times
    ]  # fmt: skip


def test_only_so_many_changes_are_listed_and_all_are_counted() -> None:
    ones = np.ones(LISTED + 4, int)
    facts = Predictions(ones, ones, 0 * ones).facts()
    assert (len(facts["changed_examples"]), facts["lost"]) == (LISTED, LISTED + 4)


class Shift:
    """A runner whose outputs are the inputs, the first of them moved by ``arrays["bias"]``."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def outputs(self, arrays: Any, inputs: np.ndarray) -> np.ndarray:
        self.seen.append(inputs)
        return inputs + arrays["bias"]

    def fresh(self) -> dict[str, np.ndarray]:
        return {"bias": np.float32([0, 0, 0]), "gradients": np.ones((5_000, 3))}

    def layer_outputs(self, arrays: Any, inputs: np.ndarray) -> dict[str, np.ndarray]:
        return {}

    def input_gradients(self, arrays: Any, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        assert len(inputs) == len(targets)
        return arrays["gradients"][: len(inputs)]


def task(data: Data) -> Task:
    return Task(name="shift", model=dict, data=lambda: data)


def result_of(scale: float, seed: int = 4) -> tuple[dict[str, Any], list[np.ndarray], np.ndarray]:
    inputs = np.random.default_rng(8).normal(3, 2, (50, 3)).astype(np.float32) * np.float32(scale)
    others = Split(inputs[:7] * 0 + 1, np.zeros(7, int))
    data = Data(others, others, Split(inputs, np.argmax(inputs, axis=1)))
    runner: Any = Shift()
    arrays = {"bias": np.float32([0, 0, 0]), "gradients": np.ones((5_000, 3))}
    moved = {**arrays, "bias": np.float32([2 * scale, 0, 0])}
    return audit(task(data), arrays, moved, runner=runner, seed=seed), runner.seen, inputs


def test_noise_is_a_share_of_the_deviation_of_the_inputs() -> None:
    result, seen, inputs = result_of(1)
    draw = np.random.default_rng(4).standard_normal((50, 3), dtype=np.float32)
    targets = np.argmax(inputs, axis=1)
    assert [row["sigma"] for row in result["noise"]] == [0.0, 0.1, 0.2, 0.4]
    # Two calls without noise, then two for each strength, on the same inputs.
    for place, noise in enumerate(result["noise"]):
        noisy = inputs + noise["sigma"] * inputs.std(dtype=np.float64) * draw
        for given in seen[2 + 2 * place : 4 + 2 * place]:
            assert given == pytest.approx(noisy, rel=1e-5)
        assert noise["before"] == np.mean(noisy.argmax(axis=1) == targets)
        after = (noisy + np.array([2, 0, 0])).argmax(axis=1)
        assert noise["after"] == np.mean(after == targets)
    assert result["noise"][0]["after"] == result["metric_after"] < result["metric_before"] == 1.0


def test_inputs_times_ten_give_the_same_figures() -> None:
    small, large = result_of(1)[0], result_of(10)[0]
    assert small["noise"] == large["noise"]
    assert small["noise"][3]["before"] < 1.0
    assert small["classes"] == large["classes"]


def test_the_cosines_are_those_of_each_example() -> None:
    before = np.array([[1, 0], [1, 0], [0, 2], [3, 4], [0, 0], [1, 1], [np.nan, 1]], np.float32)
    after = np.array([[5, 0], [0, 1], [0, -1], [4, 3], [1, 1], [0, 0], [1, 1]], np.float32)
    split = Split(np.zeros((7, 2), np.float32), np.zeros(7, int))
    runner: Any = Shift()
    pair: Any = ({"gradients": before}, {"gradients": after})
    # Cosines 1, 0, -1 and 24 / 25; two are zero in one of the networks, one is not finite.
    found = robustness.gradient_agreement(runner, pair, split)
    assert found == {
        "mean_cosine": pytest.approx(0.96 / 4),
        "median_cosine": pytest.approx(0.96 / 2),
        "share_above_0.9": 0.5,
        "examples": 7,
        "zero_gradients": 2,
        "nonfinite_gradients": 1,
    }


def test_the_alarm_about_cosines_has_its_numbers() -> None:
    facts = {"median_cosine": 0.25, "examples": 50, "zero_gradients": 4, "nonfinite_gradients": 2}
    assert alarms({"gradient_agreement": facts}) == [
        "the input gradients differ in direction: their median cosine is 0.25 over 44 examples",
        "6 of 50 examples have no gradient cosine (4 zero, 2 non-finite)",
    ]
    calm = {"median_cosine": 0.5, "examples": 50, "zero_gradients": 4, "nonfinite_gradients": 1}
    assert alarms({"gradient_agreement": calm}) == []


def test_non_finite_outputs_are_counted_on_their_side() -> None:
    facts = {"before": "dense", "after": "small", "nonfinite": [2, 5]}
    assert alarms(facts) == [
        "dense has non-finite outputs for 2 examples",
        "small has non-finite outputs for 5 examples",
    ]


@pytest.mark.parametrize(
    ("after", "named"), [(13 / 16, True), (0.82, False)], ids=["three times", "less than that"]
)
def test_a_class_is_named_from_three_times_the_loss_of_the_others(
    after: float, named: bool
) -> None:
    classes = [
        {"class": "a", "examples": 100, "before": 1.0, "after": after},
        {"class": "b", "examples": 300, "before": 1.0, "after": 15 / 16},
        {"class": "c", "examples": 50, "before": 1.0, "after": 14 / 16},
    ]
    # The others lost 1 and 2 sixteenths, hence 3 of 32 on average, whatever their sizes; the lower one counts, as
    # one of two that changed places is no measure for the other.
    said = ["class a lost 18.8 points, 19 of 100 examples (the other classes lost 9.4 on average)"]
    assert alarms({"classes": classes}) == (said if named else [])


@pytest.mark.parametrize(("agreement", "said"), [(0.95, True), (0.951, False)])
def test_churn_is_said_from_a_twentieth_on(agreement: float, said: bool) -> None:
    facts = {"metric": "accuracy", "metric_before": 0.91, "metric_after": 0.9}
    assert bool(alarms({**facts, "agreement": agreement})) is said


def test_the_worst_noise_is_named_not_the_last() -> None:
    noise = [
        {"sigma": 0.1, "before": 0.9, "after": 0.7},
        {"sigma": 0.2, "before": 0.8, "after": 0.75},
        {"sigma": 0.4, "before": None, "after": 0.1},
    ]
    facts = {"metric": "accuracy", "metric_before": 0.95, "metric_after": 0.94, "noise": noise}
    assert alarms(facts) == [
        "under noise of 0.1 standard deviations the drop is 20.0 points (without noise 1.0)"
    ]


RESULT: dict[str, Any] = {
    "task": "digits",
    "before": "dense.npz",
    "after": "small.karikomi",
    "examples": 1_360,
    "metric": "accuracy",
    "metric_before": 0.974,
    "metric_after": 0.931,
    "classes": [
        {"class": "ant", "examples": 36, "before": 0.99, "after": 0.98},
        {"class": "bee", "examples": 25, "before": 0.97, "after": 0.88},
        {"class": "cow", "examples": 41, "before": 0.9, "after": 0.94},
    ],
    "agreement": 0.9375,
    "changed": 85,
    "lost": 70,
    "gained": 12,
    "changed_examples": [
        {"index": 5, "label": "ant", "before": "ant", "after": "cow"},
        {"index": 90, "label": "bee", "before": "cow", "after": "bee"},
        {"index": 91, "label": "cow", "before": "ant", "after": "bee"},
    ],
    "noise": [
        {"sigma": 0.0, "before": 0.974, "after": 0.931},
        {"sigma": 0.2, "before": 0.96, "after": 0.85},
        {"sigma": 0.4, "before": 0.9, "after": 0.62},
    ],
    "gradient_agreement": {"mean_cosine": 0.812, "median_cosine": 0.93, "share_above_0.9": 0.75},
    "warnings": ["class bee lost 9.0 points"],
}
SUMMARY = (
    "accuracy 97.40 % -> 93.10 % (-4.30 points) on 1,360 examples; 85 predictions changed"
    " (agreement 93.75 %): 70 lost, 12 gained."
)
CLASSES = [
    ["ant", "36", "99.00 %", "98.00 %", "-1.00 points"],
    ["bee", "25", "97.00 %", "88.00 %", "-9.00 points"],
    ["cow", "41", "90.00 %", "94.00 %", "+4.00 points"],
]


def test_the_table_of_the_terminal_has_each_figure_in_its_column() -> None:
    lines = report.audit_table(RESULT).splitlines()
    assert lines[0] == "dense.npz -> small.karikomi"
    assert SUMMARY in " ".join(line.strip() for line in lines)
    head = next(place for place, line in enumerate(lines) if line.startswith("class "))
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[head:]]
    assert cells[0] == ["class", "examples", "before", "after", "change"]
    assert cells[1:] == [CLASSES[1], CLASSES[0], CLASSES[2]], "the largest loss first"
    assert "warning: class bee lost 9.0 points" in lines


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report.audit_page(RESULT))


def test_the_tiles_and_sentences_of_the_page(page: Page) -> None:
    assert page.title == "digits: what changed"
    assert page.lead == "dense.npz against small.karikomi, 1,360 examples."
    assert page.tiles == {
        "verdict": ("no gates", "--fail-if sets them"),
        "examples": ("1,360", "of the test split"),
        "accuracy after": ("93.10 %", "before 97.40 %: -4.30 points"),
        "agreement": ("93.75 %", "same prediction for an example"),
        "lost": ("70", "right before, wrong after"),
        "gained": ("12", "wrong before, right after"),
        "warnings": ("1", "found damage"),
    }
    assert SUMMARY in page.sentences
    assert (
        "Cosine between the input gradients of both models: mean 0.812, median 0.93;"
        " above 0.9 for 75.0 % of the examples."
    ) in page.sentences


def test_the_tables_of_the_page(page: Page) -> None:
    assert [[*cells.values()] for cells in page.tables["Classes"]] == CLASSES
    assert [[*cells.values()] for cells in page.tables["Examples"]] == [
        ["5", "ant", "ant", "cow", "lost"],
        ["90", "bee", "cow", "bee", "gained"],
        ["91", "cow", "ant", "bee", "wrong both times"],
    ]
    assert [[*cells.values()] for cells in page.tables["Noise"]] == [
        ["0", "97.40 %", "93.10 %", "-4.30 points"],
        ["0.2", "96.00 %", "85.00 %", "-11.00 points"],
        ["0.4", "90.00 %", "62.00 %", "-28.00 points"],
    ]


CHECKS: dict[str, Any] = {
    "gates": [
        {"gate": "drop>0.1", "outcome": "held", "value": 0.043, "interval": [0.0312, 0.0548]},
        {"gate": "churn>0.05", "outcome": "missed", "value": 0.0625, "interval": [0.05, 0.077]},
        {"gate": "class_drop>0.08", "outcome": "undecided", "value": 0.09, "where": "bee"},
    ],
    "calibration": {
        **{"ece_before": 0.0123, "ece_after": 0.0456, "nll_before": 0.11, "nll_after": 0.37},
        **{"confidence_before": 0.951, "confidence_after": 0.902, "nll_p": 0.0004},
    },
    "layers": [
        {"layer": "conv", "cka": 0.987, "alone": 0.0125},
        {"layer": "fc", "cka": 0.912, "alone": 0.034},
        {"layer": "head", "cka": 0.999, "alone": -0.002},
    ],
    "attack": {
        **{"epsilon": 0.03, "steps": 10, "examples": 500, "clean_before": 0.974, "before": 0.51},
        **{"clean_after": 0.931, "after": 0.32, "transfer": 0.44},
    },
    "slices": [
        {
            **{"slice": "night", "examples": 400, "before": 0.95, "after": 0.94, "lost": 14},
            **{"gained": 10, "p": 0.54, "least_drop": 0.023, "named": False},
        },
        {
            **{"slice": "day", "examples": 960, "before": 0.984, "after": 0.927, "lost": 56},
            **{"gained": 2, "p": 2.5e-9, "least_drop": 0.0104, "named": True},
        },
    ],
}


def test_the_further_checks_of_the_page() -> None:
    page = Page(report.audit_page(RESULT | CHECKS))
    tables = {name: [[*cells.values()] for cells in rows] for name, rows in page.tables.items()}
    assert tables["Gates"] == [
        ["drop>0.1", "held", "0.043", "0.0312 to 0.0548", ""],
        ["churn>0.05", "missed", "0.0625", "0.05 to 0.077", ""],
        ["class_drop>0.08", "undecided", "0.09", "", "bee"],
    ]
    assert tables["Calibration"] == [
        ["calibration error, debiased", "1.23 %", "4.56 %"],
        ["mean confidence", "95.1 %", "90.2 %"],
        ["negative log likelihood", "0.11", "0.37"],
    ]
    assert tables["Layers"] == [
        ["conv", "0.987", "1.25"],
        ["fc", "0.912", "3.4"],
        ["head", "0.999", "-0.2"],
    ]
    assert tables["Slices"] == [
        ["day", "960", "98.4 %", "92.7 %", "56", "2", "2.5e-09", "1.0"],
        ["night", "400", "95.0 %", "94.0 %", "14", "10", "0.54", "2.3"],
    ], "the likeliest to pay first"
    marked = [text.split()[0] for text in page.strong]
    assert marked == ["churn>0.05", "class_drop>0.08", "day", "fc"]
    assert (
        "Within 0.03 of the range of the inputs, 10 steps, 500 examples: accuracy 97.40 % -> 51.00 % before,"
        " 93.10 % -> 32.00 % after; the attack on the network before leaves the one after at 44.00 %."
    ) in page.sentences


def test_the_charts_of_the_page(page: Page) -> None:
    classes = page.charts["Classes before and after"]
    assert classes.styles == {"before": 0, "after": 1}
    for row in RESULT["classes"]:
        found = classes.dots(row["class"], 2)
        expected = [100 * row["before"], 100 * row["after"]]
        assert found == pytest.approx(expected, abs=0.1), row["class"]
    noise = page.charts["Noise on the inputs"]
    assert noise.styles == {"before": 0, "after": 1}
    for style, key in enumerate(("before", "after")):
        found = noise.values(style)
        assert [x for x, _ in found] == pytest.approx([0, 0.2, 0.4], abs=0.002)
        expected = [100 * row[key] for row in RESULT["noise"]]
        assert [y for _, y in found] == pytest.approx(expected, abs=0.1)


def test_a_metric_that_is_no_share_is_not_in_per_cent() -> None:
    result = RESULT | {"metric": "r2", "metric_before": 0.5, "metric_after": 0.25}
    page = Page(report.audit_page(result))
    assert page.tiles["r2 after"] == ("0.25", "before 0.5: -0.25")
    assert page.tables["Noise"][1]["change"] == "-0.11"
    heights = page.charts["Noise on the inputs"].heights(1)
    assert heights == pytest.approx([0.931, 0.85, 0.62], abs=0.002)
