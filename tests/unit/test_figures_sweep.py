"""Every figure of a sweep, worked out again: three unequal seeds, one run that diverges, steps of known length."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from karikomi import pack, record, registry, report
from karikomi.errors import NonFinite
from karikomi.quantize import kmeans
from karikomi.search import grid, grid_run, timed_recorder
from karikomi.search.driver import RunJournal
from karikomi.search.grid import sweep
from karikomi.tasks import Data, Recipe, Split, Task
from pages import Page

LIMITS, SPARSITIES, EPOCHS = (0.5, None), (0.0, 0.75), 2
# By limit, sparsity and seed: right ones of 20 test examples, of the first 8 of 10 training examples, and of 40
# validation examples.
RIGHT = {
    (0.5, 0.0): ((19, 12, 18), (8, 6, 4), (30, 32, 31)),
    (0.5, 0.75): ((15, 14, 7), (7, 7, 1), (20, 26, 23)),
    (None, 0.0): ((16, 20, 17), (8, 7, 5), (28, 33, 32)),
    (None, 0.75): ((13, 20, 10), (5, 8, 3), (24, 9, 24)),
}
UNTRAINED = 4  # right ones of 40
EARLIER = 10  # so many fewer after the first epoch
CLIPPED = {0: 1, 1: 3, 2: 4}  # of the 4 steps of an epoch, by seed
BETWEEN = (0.001, 0.1, 0.01)  # seconds between the 4 steps of an epoch
DIVERGED = (None, 0.75, 1)


class Clock:
    """Stands for the module `time`: only trainings let time go by."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


class Trained:
    """A training of four steps an epoch; of the short epochs that are timed each is twice as long as the one before."""

    def __init__(self, seed: int, phase: Any, timed: bool) -> None:
        self.seed, self.phase, self.epoch, self.timed = seed, phase, 0, timed
        limit = None if math.isinf(phase.clip.limit) else phase.clip.limit
        self.at = (limit, phase.sparsity or 0.0, seed)

    def run_epoch(self, recorder: Any) -> None:
        slower = (2.0 if self.phase.sparsity else 1.0) * 2**self.epoch if self.timed else 1.0
        for step, seconds in enumerate((5.0, *BETWEEN)):
            CLOCK.now += seconds * slower
            clipped = step < CLIPPED[self.seed] and self.at[0] is not None
            skipped = self.at == (0.5, 0.75, 1) and step == 3
            recorder.write({"event": "step", "clipped": clipped, "skipped": skipped})
        if self.at == DIVERGED and self.epoch == 1:
            raise NonFinite("the loss is not finite", where="blobs")
        fewer = EARLIER if self.epoch == 0 else 0
        validation = (RIGHT[self.at[:2]][2][self.seed] - fewer) / 40
        row = {
            "event": "epoch",
            "validation": validation,
            "loss": 1.0 + self.seed - 0.5 * self.epoch,
        }
        recorder.write(row)
        self.epoch += 1

    def arrays(self) -> dict[str, np.ndarray]:
        return network(*self.at)


def network(limit: float | None, sparsity: float, seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    weight = generator.normal(size=(40, 10 * (seed + 1))).astype(np.float32)
    weight[generator.random(weight.shape) < sparsity] = 0
    place = np.float32([[*RIGHT].index((limit, sparsity)), seed])
    return {"w": weight, "b": np.ones(50, np.float32), "at": place}


class Runner:
    """A runner whose outputs are right as often as `RIGHT` has it."""

    def __init__(self, data: Data, seed: int) -> None:
        self.seed, self.timed = seed, len(data.train) == 8

    def environment(self) -> dict[str, Any]:
        return {"python": "3.x"}

    def describe(self) -> str:
        return "1-2-3"

    fingerprint = describe

    def fresh(self) -> dict[str, np.ndarray]:
        return {"w": np.zeros((40, 10), np.float32)}

    def prunable(self) -> list[str]:
        return ["w"]

    def train(self, arrays: Any, phase: Any) -> Trained:
        assert (phase.stage, phase.epochs, phase.learning_rate) == ("train", EPOCHS, 0.25)
        assert phase.weight_decay == 0.125
        return Trained(self.seed, phase, self.timed)

    def shrink(self, arrays: Any) -> tuple[Any, dict[str, Any]]:
        """Remove rows without a weight: macs are the weights that stay."""
        rows = np.any(arrays["w"] != 0, axis=1) | ("at" not in arrays)
        small = {**arrays, "w": arrays["w"][rows]}
        sizes = {"macs_before": arrays["w"].size, "macs_after": small["w"].size}
        notes = {} if rows.all() else {"kept": "some"}
        return small, {**sizes, "parameters_after": small["w"].size + 52, "notes": notes}

    def notes(self) -> dict[str, str]:
        return {}

    def adopt(self, notes: Any) -> None:
        assert notes == {"kept": "some"}

    def milliseconds(self, arrays: Any) -> float:
        return arrays["w"].size / 100

    def outputs(self, arrays: Any, inputs: np.ndarray) -> np.ndarray:
        kind = int(inputs[0, 1])
        rights = UNTRAINED
        if "at" in arrays:
            point, seed = arrays["at"].astype(int)
            rights = [*RIGHT.values()][point][{1: 0, 0: 1, 2: 2}[kind]][seed]
        right = inputs[:, 0] < rights
        return np.eye(3)[np.where(right, 2, 0)]


def split(size: int, kind: float) -> Split:
    inputs = np.stack([np.arange(size), np.full(size, kind)], axis=1).astype(np.float32)
    return Split(inputs, np.full(size, 2))


TASK = Task(
    name="blobs",
    model=dict,
    data=lambda: Data(split(10, 0), split(40, 2), split(20, 1)),
    recipe=Recipe(learning_rate=0.25, weight_decay=0.125, batch_size=1),
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("sweep")
    framework = SimpleNamespace(runner_for=lambda task, data, seed: Runner(data, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "framework", lambda name: framework)
        patch.setattr(grid, "rehearse_run", lambda *_: None)
        patch.setattr(timed_recorder, "time", CLOCK)
        patch.setattr(grid_run, "MOST_TRAIN", 8)
        points = {"limits": LIMITS, "sparsities": SPARSITIES, "seeds": 3, "epochs": EPOCHS}
        yield out, sweep(TASK, **points, out=out, progress=False)


def finished(limit: float | None, sparsity: float) -> list[int]:
    return [seed for seed in range(3) if (limit, sparsity, seed) != DIVERGED]


def spread(values: list[float]) -> Any:
    mean = sum(values) / len(values)
    return pytest.approx({"mean": mean, "min": min(values), "max": max(values)}, rel=1e-9)


def test_each_point_has_mean_lowest_and_highest_of_its_finished_runs(swept: Any) -> None:
    assert [(p["limit"], p["sparsity"]) for p in swept[1]["points"]] == [*RIGHT]
    for point in swept[1]["points"]:
        at = (point["limit"], point["sparsity"])
        seeds = finished(*at)
        test, train, validation = ([of[seed] for seed in seeds] for of in RIGHT[at])
        assert (point["runs"], point["diverged"]) == (len(seeds), 3 - len(seeds))
        assert point["accuracy"] == spread([n / 20 for n in test])
        assert point["validation"] == spread([n / 40 for n in validation])
        gaps = [a / 8 - b / 20 for a, b in zip(train, test, strict=True)]
        assert point["gap"] == spread(gaps)
        assert point["loss"] == spread([0.5 + seed for seed in seeds])
        shares = [CLIPPED[seed] / 4 if at[0] else 0.0 for seed in seeds]
        assert point["clipped"] == spread(shares)
        skipped = [0.25 if at == (0.5, 0.75) and seed == 1 else 0.0 for seed in seeds]
        assert point["skipped"] == spread(skipped)


def test_the_time_of_a_step_is_that_of_short_epochs_alone_without_the_first(swept: Any) -> None:
    # The middle one of 1, 10 and 100 milliseconds, doubled from epoch to epoch; pruning takes twice as long.
    for point in swept[1]["points"]:
        slower = 2.0 if point["sparsity"] else 1.0
        times = [10.0 * slower * 2**epoch for epoch in (1, 2, 3)]
        assert point["ms_per_step"] == spread(times)


def test_epochs_and_seconds_to_the_target(swept: Any) -> None:
    """The target is the mean validation metric of the chosen setting, 0.775 of limit 0.5 or no clip without pruning."""
    result = swept[1]
    target = result["points"][2]["validation"]["mean"]
    assert result["target"] == target == pytest.approx((28 + 33 + 32) / 120)
    for point in result["points"]:
        at = (point["limit"], point["sparsity"])
        reached = [seed for seed in finished(*at) if RIGHT[at][2][seed] / 40 >= target]
        assert point["reached_target"] == len(reached)
        epochs = {"mean": 2.0, "min": 2, "max": 2} if reached else dict.fromkeys(_STATS)
        assert point["epochs_to_target"] == epochs
        # Ten steps an epoch, of 140/3 milliseconds each.
        mean = 2 * 10 * 140 / 3 / 1e3
        assert point["seconds_to_target"]["mean"] == (pytest.approx(mean) if reached else None)


_STATS = ("mean", "min", "max")


def test_the_costs_are_those_of_the_network_without_dead_rows(swept: Any) -> None:
    for point in swept[1]["points"]:
        at = (point["limit"], point["sparsity"])
        weights = [network(*at, seed)["w"] for seed in finished(*at)]
        small = [w[np.any(w != 0, axis=1)].size for w in weights]
        # What is not pruned costs what the untrained network does.
        assert point["macs"] == spread([400] * len(small) if at[1] == 0 else small)
        if at[1]:
            assert point["parameters"] == spread([n + 52 for n in small])
            whole = [w.size for w in weights]
            # The whole network is timed once, as the untrained one of 400 weights.
            took = [n / 100 if n < m else 4.0 for n, m in zip(small, whole, strict=True)]
            assert point["ms"] == spread(took) and min(took) != 4.0


def test_the_answer(swept: Any) -> None:
    """Validation of 40: without pruning 30 32 31 against 28 33 32, equal means; pruned 20 26 23, and one diverges."""
    result = swept[1]
    assert [point["verdict"] for point in result["points"]] == [
        *("within noise", "chosen", "chosen", "diverges")
    ]
    first, second = result["answer"]["groups"]
    assert (first["best"], first["chosen"], first["within_noise"]) == (0, 2, [0, 2])
    assert (second["best"], second["chosen"], second["diverging"]) == (1, 1, [3])
    said = result["answer"]["sentences"]
    assert said[0] == (
        "sparsity 0 %: no clip (the loosest within one standard error of the best, limit 0.5). On the validation"
        " split accuracy 77.50 %, on the test split 88.33 %, mean of 3 runs."
    )
    assert "0.5 to no clip are within noise." in said
    assert "No clip diverges in 1 of 3 runs (Wilson 6 to 79 %)." in said
    scores = [point["scores"] for point in result["points"]]
    assert scores[3] == [0.6, None, 0.6] and scores[0] == [0.75, 0.8, 0.775]


def test_the_front_has_what_no_other_betters_in_metric_and_bytes(swept: Any) -> None:
    points = [point for point in swept[1]["points"] if not point["diverged"]]
    costs = [(-p["validation"]["mean"], p["bytes"]["mean"]) for p in points]
    # Of the two without pruning, equal in both, the first stays.
    assert costs[0] == costs[2] and costs[1][1] < costs[0][1] and costs[1][0] > costs[0][0]
    assert [point["front"] for point in points] == [True, True, False]
    assert not swept[1]["points"][3]["front"], "a setting that diverges is none"


def test_the_bytes_are_those_of_a_file_with_sixteen_shared_values(
    swept: Any, tmp_path: Path
) -> None:
    for point in swept[1]["points"]:
        sizes = []
        for seed in finished(point["limit"], point["sparsity"]):
            arrays = network(point["limit"], point["sparsity"], seed)
            coded = {**arrays, "w": kmeans(arrays["w"], entries=16)}
            sizes.append(pack.save(coded, tmp_path / "size.karikomi").stat().st_size)
        assert point["bytes"] == spread(sizes)
        assert len({*sizes}) == len(sizes)


def test_what_diverged_and_what_was_skipped_is_said(swept: Any) -> None:
    assert swept[1]["warnings"] == [
        "limit 0.5, sparsity 0.75, seed 1: 25% of the steps skipped, gradients not finite",
        "limit none, sparsity 0.75, seed 1: diverged, left out of the figures"
        " (blobs: the loss is not finite)",
    ]
    assert (swept[1]["seeds"], swept[1]["metric"]) == ([0, 1, 2], "accuracy")


def test_the_journal_and_the_record_of_a_run_have_its_figures(swept: Any) -> None:
    runs = {}
    with RunJournal(swept[0] / "journal.jsonl", {}) as journal:
        lines = journal.path.read_text().splitlines()
    for line in lines[1:]:
        values = json.loads(line)
        own = values["proposal"]
        runs[own["limit"], own["sparsity"], own["seed"]] = values["facts"]
    run = runs[0.5, 0.75, 1]
    (figures,) = run["results"]
    assert (figures["accuracy"], figures["train"], figures["validation"]) == (
        14 / 20,
        7 / 8,
        26 / 40,
    )
    assert figures["gap"] == 7 / 8 - 14 / 20 and run["epochs"] == [16 / 40, 26 / 40]
    assert (run["clipped"], run["skipped"], run["diverged"], run["steps"]) == (0.75, 0.25, None, 8)
    path = swept[0] / "runs" / "limit-0.5_sparsity-0.75_seed-1.jsonl"
    steps = [row for row in record.read(path) if row["event"] == "step"]
    waits = [None if row["ms"] is None else round(row["ms"], 6) for row in steps]
    assert waits == [None, 1.0, 100.0, 10.0] * EPOCHS
    lost = runs[DIVERGED]
    # A run that diverged is worth what the untrained network is, never NaN.
    assert lost["results"] == [
        {"bits": None, "validation": UNTRAINED / 40}
        | dict.fromkeys(("accuracy", "train", "gap", "bytes"))
    ]
    assert lost["clipped"] == 0.0 and "not finite" in lost["diverged"] and lost["steps"] == 8


def test_the_page_has_the_answer_and_each_figure(swept: Any) -> None:
    result = swept[1]
    page = Page(report.sweep_page(result))
    for sentence in result["answer"]["sentences"]:
        assert sentence in page.sentences
    assert page.tiles["chosen, sparsity 0 %"] == (
        "limit none",
        "accuracy 88.33 % on the test split",
    )
    assert page.tiles["chosen, sparsity 75 %"] == (
        "limit 0.5",
        "accuracy 60.00 % on the test split",
    )
    rows = page.tables["Verdicts"]
    assert [(row["sparsity 0 %"], row["sparsity 75 %"]) for row in rows] == [
        ("within noise", "chosen"),
        ("chosen", "diverges\n(1 of 3 diverged)"),
    ]
    seen = page.tables["accuracy on the validation split"][1]
    assert seen["sparsity 0 %"] == "77.50 %\n(70.00 to 82.50 %)"
    assert page.tables["Loss of the last epoch"][1]["sparsity 75 %"] == "1.5\n(0.5 to 2.5)"
    assert page.tables["Epochs to the target"][0]["sparsity 75 %"] == "n/a"
    assert page.tables["Epochs to the target"][1]["sparsity 0 %"] == "2"
    assert page.tables["Milliseconds a step"][0]["sparsity 0 %"] == "46.7\n(20 to 80)"
    assert page.tables["Multiply-accumulates of one example"][0]["sparsity 0 %"] == "400"
    chart = page.charts["accuracy on the validation split over bytes"]
    best = sorted(
        (p["bytes"]["mean"], p["validation"]["mean"]) for p in result["points"] if p["front"]
    )
    heights = chart.heights(0)
    assert heights == pytest.approx([100 * value for _, value in best], abs=0.2)
    lines = report.sweep_table(result).splitlines()
    assert [line.split()[0] for line in lines if " * " in line] == ["0.5", "none"]
    assert max(map(len, lines)) <= 80


RUNS = {(0.5, 0.0): 3, (0.5, 0.75): 3, (None, 0.0): 3, (None, 0.75): 2}


def stat(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "min": low, "max": high}


POINTS = [
    {
        "limit": limit,
        "sparsity": sparsity,
        "runs": RUNS[limit, sparsity],
        "accuracy": stat(0.7 + 0.01 * k, 0.61 + 0.01 * k, 0.95 - 0.01 * k),
        "gap": stat(0.011 + k / 100, 0.002, 0.03 + k / 100),
        "ms_per_step": stat(1.5 + k, 1.25, 8.5 + k),
        "bytes": stat(12_300 + 1000 * k, 9_000, 45_600 + 1000 * k),
        "clipped": stat(0.31 + k / 100, 0.2, 0.77 + k / 100),
    }
    for k, (limit, sparsity) in enumerate([(0.5, 0.0), (None, 0.75), (0.5, 0.75), (None, 0.0)])
]
RESULT = {"task": "blobs", "metric": "accuracy", "seeds": [0, 1, 2], "points": POINTS}


def test_the_table_of_the_terminal_has_each_figure_in_its_column() -> None:
    lines = report.sweep_table(RESULT).splitlines()
    assert lines[0].split() == [
        *("limit", "sparse", "runs", "accuracy", "min..max", "clipped", "gap", "ms/step", "size")
    ]
    cells = [line.replace(" %", "%").replace(" kB", "kB").split() for line in lines[1:5]]
    assert cells == [
        *(["0.5", "0%", "3", "70.00%", "61.00..95.00", "31%", "0.011", "1.5", "12.3kB"],),
        *(["0.5", "75%", "3", "72.00%", "63.00..93.00", "33%", "0.031", "3.5", "14.3kB"],),
        *(["none", "0%", "3", "73.00%", "*", "64.00..92.00", "34%", "0.041", "4.5", "15.3kB"],),
        *(["none", "75%", "2", "71.00%", "62.00..94.00", "32%", "0.021", "2.5", "13.3kB"],),
    ]
    assert lines[-1].startswith("* highest mean")


def test_of_an_error_the_lowest_mean_is_the_best() -> None:
    result = RESULT | {"metric": "mse", "goal": "min"}
    lines = report.sweep_table(result).splitlines()
    assert [line.split()[:2] for line in lines if " * " in line[:-1]] == [["0.5", "0"]]
    assert lines[-1].startswith("* lowest mean")
    best = Page(report.sweep_page(result)).tiles["best mean mse"]
    assert best == ("0.7", "limit 0.5, sparsity 0 %")


def test_warnings_stand_first_and_none_is_cut() -> None:
    long = "limit none, sparsity 0.75, seed 1: diverged, left out of the figures " + "very " * 30
    result = RESULT | {"warnings": ["short", f"{long}long"]}
    text = report.sweep_table(result)
    assert text.startswith("warning: short\nwarning: limit none")
    assert " ".join(text.split()).startswith(f"warning: short warning: {long}long limit sparse")
    html = report.sweep_page(result)
    assert html.index(f"Warning: {long}long.") < html.index("best mean")


def test_sparsities_that_are_near_one_another_keep_their_digits() -> None:
    seen = ((0.99, "99 %"), (0.995, "99.5 %"), (0.9975, "99.75 %"), (0.07, "7 %"), (None, "n/a"))
    points = [POINTS[0] | {"sparsity": sparsity} for sparsity, _ in seen]
    result = RESULT | {"points": points}
    said = [said for _, said in sorted(seen, key=lambda pair: pair[0] or 2.0)]
    lines = report.sweep_table(result).splitlines()[1:6]
    assert [re.split(r"  +", line)[1] for line in lines] == said
    page = Page(report.sweep_page(result))
    columns = [f"sparsity {one}" for one in said]
    assert [*page.tables["Milliseconds a step"][0]] == ["limit", *columns]
    assert [*page.charts["Clipped steps by limit"].styles] == columns
    best = Page(report.sweep_page(RESULT | {"points": points[1:2]})).tiles["best mean accuracy"]
    assert best == ("70.00 %", "limit 0.5, sparsity 99.5 %")


def test_the_page_has_each_figure_in_its_table() -> None:
    page = Page(report.sweep_page(RESULT))
    assert page.lead == "4 settings, seeds 0, 1, 2."
    assert page.tiles == {"best mean accuracy": ("73.00 %", "limit none, sparsity 0 %")}
    expected = {
        "accuracy on the test split": [
            ("70.00 %\n(61.00 to 95.00 %)", "72.00 %\n(63.00 to 93.00 %)"),
            ("73.00 %\n(64.00 to 92.00 %)", "71.00 %\n(62.00 to 94.00 %)"),
        ],
        "Generalization gap": [
            ("1.10 %\n(0.20 to 3.00 %)", "3.10 %\n(0.20 to 5.00 %)"),
            ("4.10 %\n(0.20 to 6.00 %)", "2.10 %\n(0.20 to 4.00 %)"),
        ],
        "Share of steps that were clipped": [
            ("31.0 %\n(20.0 to 77.0 %)", "33.0 %\n(20.0 to 79.0 %)"),
            ("34.0 %\n(20.0 to 80.0 %)", "32.0 %\n(20.0 to 78.0 %)"),
        ],
        "Milliseconds a step": [
            ("1.5\n(1.25 to 8.5)", "3.5\n(1.25 to 10.5)"),
            ("4.5\n(1.25 to 11.5)", "2.5\n(1.25 to 9.5)"),
        ],
        "Bytes of the file": [
            ("12.3 kB\n(9.00 to 45.6 kB)", "14.3 kB\n(9.00 to 47.6 kB)"),
            ("15.3 kB\n(9.00 to 48.6 kB)", "13.3 kB\n(9.00 to 46.6 kB)"),
        ],
    }
    for caption, rows in expected.items():
        found = page.tables[caption]
        assert [row["limit"] for row in found] == ["0.5", "none"], caption
        assert [(row["sparsity 0 %"], row["sparsity 75 %"]) for row in found] == rows, caption


def test_the_charts_have_a_line_for_each_sparsity_with_its_whiskers() -> None:
    charts = Page(report.sweep_page(RESULT)).charts
    accuracy = charts["accuracy on the test split by limit"]
    assert [text for _, text in accuracy.across.ticks] == ["0.5", "none"]
    assert accuracy.styles == {"sparsity 0 %": 0, "sparsity 75 %": 1}
    near = {"abs": 0.1}
    assert accuracy.heights(0) == pytest.approx([70, 73], **near)
    assert accuracy.heights(1) == pytest.approx([72, 71], **near)
    assert accuracy.whiskers(0) == [pytest.approx(ends, **near) for ends in [(61, 95), (64, 92)]]
    assert accuracy.whiskers(1) == [pytest.approx(ends, **near) for ends in [(63, 93), (62, 94)]]
    clipped = charts["Clipped steps by limit"]
    assert clipped.heights(0) == pytest.approx([31, 34], **near)
    assert clipped.whiskers(1) == [pytest.approx(ends, **near) for ends in [(20, 79), (20, 78)]]
