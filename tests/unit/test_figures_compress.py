"""Every figure of a compression, worked out again: a network of 24 weights whose accuracy at each stage is given."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import karikomi as kk
from karikomi import pack, registry, report
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.quantize import Codebook, Coded, UniformGrid, kmeans
from karikomi.search import folder, pipeline
from karikomi.search.accounting import bytes_by_cause
from karikomi.search.candidate_steps import step_of
from karikomi.search.driver import Budgets, Finished, Proposal
from karikomi.search.ladder import Ladder
from karikomi.search.run_reference import TaskSource
from karikomi.search.search_run import SearchRequest, epochs_of
from karikomi.tasks import Data, Recipe, Split, Task
from pages import Page

WEIGHT = np.arange(1, 25, dtype=np.float32).reshape(4, 6) / 8
DENSE = {"w": WEIGHT, "b": np.float32([0.5, -1.0, 0.0]), "norm": np.ones(5, np.float32)}
# How many of 10 validation examples and of 20 test examples are right, by distinct non-zero weights.
VALIDATION = {24: 8, 18: 8, 9: 7, 6: 5, 5: 7, 4: 9, 3: 6, 0: 2}
TEST = {24: 17, 18: 18, 9: 15, 6: 10, 5: 14, 4: 13, 3: 9, 0: 4}


PHASES: list[Any] = []
MADE: list[Any] = []


class Trained:
    """A training that prunes the smallest weights, and clips one step of three."""

    def __init__(self, arrays: dict[str, np.ndarray], phase: Any) -> None:
        self.phase, self.epoch, self._arrays = phase, 0, arrays
        PHASES.append(phase)
        if phase.stage == "train":
            self._arrays = DENSE
        elif phase.sparsity is not None:
            pruned = WEIGHT * (np.arange(24).reshape(4, 6) >= round(24 * phase.sparsity))
            self._arrays = {**DENSE, "w": pruned.astype(np.float32)}
        elif phase.coded:
            self._arrays = {**arrays, "w": self.coded()["w"].decode()}

    def run_epoch(self, recorder: Any) -> None:
        for step in range(3):
            flags = {"clipped": step == 1, "skipped": self.phase.stage == "train" and step == 2}
            recorder.write({"event": "step", "stage": self.phase.stage, "step": step, **flags})
        self.epoch += 1

    def arrays(self) -> dict[str, np.ndarray]:
        return dict(self._arrays)

    def masks(self) -> dict[str, np.ndarray]:
        return {"w": self._arrays["w"] != 0}

    def coded(self) -> dict[str, Coded]:
        tuned = {}
        for name, coded in (self.phase.coded or {}).items():
            tuned[name] = Coded(coded.codes, Codebook(2 * coded.grid.numbers))
        return tuned

    def checkpoint(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {"x": np.zeros(1, np.float32)}, {}


class Runner:
    """A runner whose outputs are right as often as the tables above have it."""

    def notes(self) -> dict[str, str]:
        return {}

    def environment(self) -> dict[str, Any]:
        return {"python": "3.x", "threads": 3}

    def describe(self) -> str:
        return "6-4"

    fingerprint = describe

    def fresh(self) -> dict[str, np.ndarray]:
        return {**DENSE, "w": np.zeros_like(WEIGHT)}

    def layer_outputs(self, arrays: dict[str, np.ndarray], inputs: Any) -> dict[str, np.ndarray]:
        return {}

    def prunable(self) -> list[str]:
        return ["w"]

    def biases(self) -> list[str]:
        return ["b"]

    def left_alone(self) -> dict[str, str]:
        return {"norm": "weight of a norm"}

    def tied(self) -> dict[str, str]:
        return {}

    def output_units(self) -> dict[str, Any]:
        return {"w": kk.quantize.OutputUnits(axis=0)}

    def given_bytes(self, arrays: dict[str, np.ndarray]) -> dict[str, int]:
        return {name: array.nbytes for name, array in arrays.items()}

    def train(self, arrays: dict[str, np.ndarray], phase: Any) -> Trained:
        return Trained(arrays, phase)

    def shrink(
        self, arrays: dict[str, np.ndarray], *, width: float | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return arrays, {"removed": 0}

    def quantized(
        self, arrays: dict[str, np.ndarray], *, entries: int | None = None, **size: Any
    ) -> tuple[dict[str, Any], dict[str, str]]:
        if entries is None:
            assert size == {"only": ["norm"], "bits": 8}, "what has no codes yet"
            return arrays, {}
        return {**arrays, "w": kmeans(arrays["w"], entries=entries)}, {"norm": "as it is"}

    def outputs(self, arrays: dict[str, np.ndarray], inputs: np.ndarray) -> np.ndarray:
        values = np.unique(arrays["w"][arrays["w"] != 0]).size
        rights = {10: VALIDATION, 20: TEST}[len(inputs)][values]
        return np.eye(3)[np.where(inputs[:, 0] < rights, 2, 0)]

    def costs(self, arrays: dict[str, np.ndarray], examples: int) -> dict[str, int | None]:
        return {"parameters": sum(array.size for array in arrays.values()), "memory": examples}

    def times(self, before: Any, after: Any, examples: int) -> list[tuple[float, float]]:
        return [(2.0 * examples, 1.0 * examples)] * 3

    def forms(self) -> dict[str, Any]:
        return {}

    def input_gradients(self, arrays: Any, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.ones_like(inputs)


def split(size: int) -> Split:
    # Whole numbers: without noise, that would change which example is which.
    return Split(np.arange(size).reshape(size, 1), np.full(size, 2))


def task(**changes: Any) -> Task:
    recipe = {"train_epochs": 2, "prune_epochs": 1, "tune_epochs": 1, "batch_size": 5}
    recipe |= {"learning_rate": 0.5, "weight_decay": 0.25}
    ladder = {"sparsities": (0.25, 0.625, 0.75, 0.875), "entries": (5, 4, 3), "rates": ()}
    return Task(
        name="tiny",
        model=dict,
        data=lambda: Data(split(30), split(10), split(20)),
        recipe=Recipe(**{**recipe, **ladder, **changes}),
    )


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    framework = SimpleNamespace(runner_for=lambda task, data, seed: Runner())
    monkeypatch.setattr(registry, "framework", lambda name: framework)
    monkeypatch.setattr(pipeline, "rehearse", lambda *_, **__: 0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Return the result of a run with a budget of exactly one validation example."""
    framework = SimpleNamespace(runner_for=lambda task, data, seed: Runner())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "framework", lambda name: framework)
        patch.setattr(pipeline, "rehearse", lambda *_, **__: 0.0)
        out = tmp_path_factory.mktemp("run") / "out"
        PHASES.clear()
        result = kk.compress(task(), out=out, max_drop=0.1, seed=3, progress=False)
        MADE[:] = PHASES
        yield result


def test_the_metrics_are_those_of_their_split_and_network(made: dict[str, Any]) -> None:
    # The deepest rung within one example of 8 has 9 weights; 5 and 4 shared values hold, 3 do not.
    assert (made["metric_before"], made["metric_after"]) == (17 / 20, 13 / 20)
    assert made["drop"] == pytest.approx(4 / 20)
    assert (made["validation_before"], made["validation_after"]) == (0.8, 0.9)
    assert made["examples"] == {"train": 30, "validation": 10, "test": 20}
    assert made["predictions"] == 20
    assert (made["seed"], made["max_drop"], made["network"]) == (3, 0.1, "6-4")
    assert (made["task"], made["framework"], made["metric"]) == ("tiny", "torch", "accuracy")
    assert (made["verified"], made["resumed"], made["warnings"]) == (True, False, [])
    audited = made["audit"]
    assert (audited["before"], audited["after"]) == ("dense", "compressed")
    assert (audited["metric_before"], audited["metric_after"]) == (17 / 20, 13 / 20)
    assert (audited["lost"], audited["gained"]) == (4, 0)


def test_each_phase_goes_on_from_the_one_before(made: dict[str, Any]) -> None:
    phases = {phase.stage: phase for phase in MADE}
    assert [(phase.stage, phase.epochs, phase.learning_rate) for phase in MADE] == [
        ("train", 2, 0.5),
        ("prune-0.25", 1, 0.5),
        ("prune-0.625", 1, 0.5),
        ("prune-0.75", 1, 0.5),
        ("quantize-0.625-5", 1, 0.05),
        ("quantize-0.625-4", 1, 0.05),
        ("quantize-0.625-3", 1, 0.05),
    ]
    assert phases["train"].weight_decay == 0.25 and phases["train"].teacher is None
    assert all(phase.clip == task().recipe.clip for phase in MADE)
    kept = 0
    for stage, initial, sparsity in (
        ("0.25", 0.0, 0.25),
        ("0.625", 0.25, 0.625),
        ("0.75", 0.625, 0.75),
    ):
        phase = phases[f"prune-{stage}"]
        assert (phase.initial, phase.sparsity) == (initial, sparsity)
        masks = {name: int(mask.sum()) for name, mask in phase.masks.items()}
        assert masks == ({"w": kept} if kept else {})
        assert np.array_equal(phase.teacher["w"], WEIGHT), "the teacher is the dense network"
        kept = round(24 * (1 - sparsity))
    for entries in (5, 4, 3):
        phase = phases[f"quantize-0.625-{entries}"]
        assert phase.coded["w"].grid.values.size == entries + 1
        assert np.array_equal(phase.teacher["w"], WEIGHT)
        assert (phase.sparsity, [*phase.coded]) == (None, ["w"])


def test_a_training_that_made_it_worse_is_said(
    ours: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VALIDATION, 0, 9)
    result = kk.compress(task(), out=tmp_path / "a", max_drop=0.1, progress=False)
    assert len(result["warnings"]) == 1 and "lowered the accuracy" in result["warnings"][0]
    assert result["warnings"][0].endswith("0.9 before, 0.8 after")
    monkeypatch.setitem(VALIDATION, 0, 8)
    result = kk.compress(task(), out=tmp_path / "b", max_drop=0.1, progress=False)
    assert result["warnings"] == []


def test_the_seconds_are_those_of_all_calls(
    ours: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def monotonic() -> float:
        return now

    monkeypatch.setattr(folder, "time", SimpleNamespace(monotonic=monotonic))
    for seconds, call in ((2.0, 1), (5.0, 2)):
        with folder.Folder(tmp_path / "out", {"a": 1}) as opened:
            now += seconds
            opened.finish(f"stage {call}", {})
            now += 3.0
            opened.finish(f"another {call}", {})
            now += 100.0
            assert opened.resumed is (call == 2)
    assert opened.seconds == (2.0 + 3.0) + (5.0 + 3.0)


def test_eight_bits_have_a_scale_for_each_unit(ours: None, tmp_path: Path) -> None:
    result = kk.compress(task(entries=(3,)), out=tmp_path, max_drop=0.1, progress=False)
    assert [row["what"] for row in result["candidates"]][3:] == [
        "3 shared weights per tensor, not tuned",
        "3 shared weights per tensor",
        "8 bits per channel",
    ]
    quantizers = {row["name"]: row["quantizer"] for row in result["tensors"]}
    assert quantizers == {"w": "uniform 8 bits, axis 0", "b": "uniform 8 bits", "norm": "none"}
    half = WEIGHT * (WEIGHT >= 2)
    step = half.max(axis=1, keepdims=True) / 127
    found = kk.load(result["file"])["w"]
    assert np.all(np.abs(found - half) <= step / 2 + 1e-6)
    assert result["metric_after"] == TEST[9] / 20


def test_the_sizes_are_those_of_the_files(made: dict[str, Any]) -> None:
    size = Path(made["file"]).stat().st_size
    dense = len(safetensors.numpy.save(DENSE))
    assert (made["bytes_packed"], made["bytes_dense"]) == (size, dense)
    assert made["ratio"] == dense / size
    # 24 weights and 8 other numbers, of which 9 weights, 2 biases and 5 of the norm are not zero.
    assert (made["parameters"], made["nonzero"]) == (24 + 8, 9 + 2 + 5)
    assert made["sparsity"] == 0.625
    assert made["left_alone"] == {"norm": "weight of a norm"}
    loaded, half = kk.load(made["file"]), WEIGHT * (WEIGHT >= 2)
    assert np.array_equal(loaded["w"], 2 * kmeans(half, entries=4).decode()), "as tuned"
    assert loaded["b"] == pytest.approx(DENSE["b"], abs=1 / 127)
    assert np.array_equal(loaded["norm"], DENSE["norm"])


def test_each_tensor_has_its_own_account(made: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in made["tensors"]}
    seen = {entry.name: entry for entry in pack.inspect(made["file"]).entries}
    sizes = {"w": (24, 9, 0.625), "b": (3, 2, 1 - 2 / 3), "norm": (5, 5, 0.0)}
    quantizers = {"w": "codebook 4", "b": "uniform 8 bits", "norm": "none"}
    for name, (elements, nonzero, sparsity) in sizes.items():
        row, packed = rows[name], seen[name].payload + seen[name].tables
        assert (row["elements"], row["nonzero"]) == (elements, nonzero)
        assert row["sparsity"] == pytest.approx(sparsity)
        assert (row["quantizer"], row["codec"]) == (quantizers[name], seen[name].codec)
        assert row["bits_per_weight"] == 8 * packed / elements
        assert (row["bytes"]["dense"], row["bytes"]["packed"]) == (4 * elements, packed)
    assert rows["w"]["shape"] == rows["w"]["shape_after"] == [4, 6]
    causes = made["bytes_by_cause"]
    for cause in ("dense", "pruned", "quantized", "packed"):
        assert causes[cause] == sum(row["bytes"][cause] for row in made["tensors"])
    assert causes["file"] == made["bytes_packed"] and causes["dense"] == 4 * 32


def test_a_tensor_that_was_shrunk_is_counted_by_its_dense_size(
    ours: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shrink(
        self: Runner, arrays: dict[str, np.ndarray], *, width: float | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {**arrays, "w": arrays["w"][2:]}, {"removed": 2}

    def quantized(*_: Any, **__: Any) -> Any:
        raise Unsupported("nothing of this can be quantized")

    monkeypatch.setattr(Runner, "shrink", shrink)
    monkeypatch.setattr(Runner, "quantized", quantized)
    result = kk.compress(task(), out=tmp_path, max_drop=0.1, progress=False)
    (row,) = [row for row in result["tensors"] if row["name"] == "w"]
    # 15 of 24 weights were pruned, 12 of them with the first two units.
    assert (row["shape"], row["shape_after"]) == ([4, 6], [2, 6])
    assert (row["elements"], row["nonzero"], row["sparsity"]) == (24, 9, 0.625)
    assert row["bytes"]["dense"] == 4 * 24
    assert row["bits_per_weight"] == 8 * row["bytes"]["packed"] / 24


def test_each_cause_by_hand() -> None:
    codes = np.zeros(64, np.uint8)
    codes[[0, 3, 40]] = 1, 2, 2
    coded = Coded(codes, Codebook(np.float32([0, -1, 3])))
    # Gaps 0, 2, 36. Floats: 3 of 6 + 32 bits are 114, 4 of 5 + 32 more. Codes of 2 bits: 3 of 6 + 2 are 24 bits.
    assert bytes_by_cause(coded, 9) == {
        "dense": 256,
        "pruned": 15,
        "quantized": 3 + 12,
        "packed": 9,
    }
    bits = Coded(codes.astype(np.int8), UniformGrid(np.float32([2.0]), None, 4))
    assert bytes_by_cause(bits, 9)["quantized"] == 4 + 4  # 3 of 6 + 4 bits, and the scale
    floats = np.zeros(64)
    floats[[0, 3, 40]] = 1.5
    # 3 of 6 + 64 bits; a type of eight bytes is eight bytes.
    expected = {"dense": 512, "pruned": 27, "quantized": 27, "packed": 9}
    assert bytes_by_cause(floats, 9) == expected


def test_the_candidates_are_in_order_with_their_own_figures(made: dict[str, Any]) -> None:
    rows = [
        (row["stage"], row["what"], row["validation"], row["passed"], row["chosen"])
        for row in made["candidates"]
    ]
    assert rows == [
        ("prune", "sparsity 0.25", 0.8, True, False),
        ("prune", "sparsity 0.625", 0.7, True, True),
        ("prune", "sparsity 0.75", 0.5, False, False),
        ("quantize", "5 shared weights per tensor, not tuned", 0.7, True, False),
        ("quantize", "4 shared weights per tensor, not tuned", 0.9, True, False),
        ("quantize", "3 shared weights per tensor, not tuned", 0.6, False, False),
        ("quantize", "5 shared weights per tensor", 0.7, True, False),
        ("quantize", "4 shared weights per tensor", 0.9, True, True),
        ("quantize", "3 shared weights per tensor", 0.6, False, False),
    ]
    candidates = Path(made["file"]).parent / "candidates"
    names = [f"*/stages/quantize-0.0-{entries}-untuned.karikomi" for entries in (5, 4, 3)]
    names += [f"*/stages/quantize-0.625-{entries}.karikomi" for entries in (5, 4, 3)]
    (files,) = zip(*(candidates.glob(name) for name in names), strict=True)
    assert [row.get("bytes") for row in made["candidates"]] == [
        *[None] * 3,
        *(file.stat().st_size for file in files),
    ]
    assert Path(made["file"]).read_bytes() == files[4].read_bytes()


def test_the_steps_of_all_stages_are_counted(made: dict[str, Any]) -> None:
    # 2 epochs of training, 3 rungs, 3 codebooks; 3 steps each.
    clip = {key: made["clip"][key] for key in ("steps", "clipped", "skipped")}
    assert clip == {"steps": 24, "clipped": 8, "skipped": 2}
    assert made["clip"]["rule"] == "ByGlobalNorm(limit=1.0)"
    assert made["environment"] == {"python": "3.x", "threads": 3, "changed": []}
    assert json.loads((Path(made["file"]).parent / "result.json").read_text()) == made


def ladder(**changes: Any) -> Ladder:
    whole: dict[str, Any] = {
        "origin": "trained",
        "recipe": task(**changes).recipe,
        "prunes": True,
        "trains": True,
        "budgets": Budgets(max_drop=0.1, objective="bytes"),
        "drop": task().drop,
        "slack": 1e-9,
        "facts_of": lambda found: found.facts,
    }
    return Ladder(**whole)


def walked(walk: dict[Any, Any], search: Ladder) -> dict[Proposal, Finished]:
    """Return the candidates of a search whose files have given sizes and verdicts, by sparsity and what they are."""
    finished: dict[Proposal, Finished] = {}
    while proposals := search.propose(finished):
        for proposal in proposals:
            settings, step = proposal.settings, step_of(proposal)
            rung = (settings.get("prune") or [0.0])[-1]
            size, held = 0, True
            if step == "prune":
                held = RUNGS[rung]
            elif step == "entries":
                size, held = walk.get((rung, settings["entries"]), (1, False))
            elif step == "codebook":
                size, held = 8, False
            elif step == "bits":
                size, held = 9, rung in walk.get("eight", ())
            elif step == "store":
                size = 99
            facts = {"validation": 0.8 if held else 0.5, "bytes": size}
            finished[proposal] = Finished("", proposal, facts)
    return finished


RUNGS = {0.25: True, 0.5: True, 0.75: False}


@pytest.mark.parametrize(
    ("walk", "rung", "what", "tried"),
    [
        # The smallest that holds, neither the first nor the last that was tried.
        ({(0.5, 5): (7, True), (0.5, 4): (6, True), (0.5, 3): (5, False)}, 0.5, (0.5, 4), 3),
        ({(0.5, 5): (6, True), (0.5, 4): (7, True), (0.5, 3): (8, True)}, 0.5, (0.5, 5), 3),
        # 8 bits only where no codebook holds, and the rung below only where those fail too.
        ({"eight": [0.5]}, 0.5, (0.5, "int8"), 4),
        ({(0.25, 4): (7, True), "eight": [0.0]}, 0.25, (0.25, 4), 4 + 3),
        ({"eight": [0.0]}, 0.0, (0.0, "int8"), 4 + 4 + 4),
        ({}, 0.0, (0.0, "none"), 4 + 4 + 4 + 1),
    ],
)
def test_the_search_takes_the_smallest_of_the_deepest_rung_that_holds(
    walk: dict[Any, Any], rung: float, what: Any, tried: int
) -> None:
    search = ladder(sparsities=tuple(RUNGS))
    found = walked(walk, search)
    files = search.files(found)
    facts = [{**file.facts, "drop": 0.8 - file.facts["validation"]} for file in files]
    chosen = files[search.budgets.judge(facts).best].proposal.settings
    ends = {"bits": "int8", "store": "none"}
    end = next(
        ends.get(name, chosen[name]) for name in ("entries", "bits", "store") if name in chosen
    )
    reached = (chosen.get("prune") or [0.0])[-1]
    assert ((reached, end), reached) == (what, rung)
    untuned = [file for file in files if "codebook" in file.proposal.settings]
    assert len(files) == tried + len(untuned) and len(untuned) == 3
    assert [item.proposal.settings["prune"][-1] for item in search.rungs(found)] == [*RUNGS]
    shrunk = [p for p in found if step_of(p) == "shrink" and (rung or "prune" not in p.settings)]
    assert shrunk[-1].settings.get("prune", [0.0])[-1] == rung


def error_of_task(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float(np.mean(np.argmax(outputs, axis=1) != targets))


def test_an_error_is_compressed_within_its_budget(ours: None, tmp_path: Path) -> None:
    """The shares of wrong answers: the same choices as by the accuracy, and the drop is what they rose by."""
    stated = dataclasses.replace(task(), metric=error_of_task, goal="min")
    result = kk.compress(stated, out=tmp_path / "out", max_drop=0.1, progress=False)
    assert (result["metric"], result["goal"], result["warnings"]) == ("error_of_task", "min", [])
    certificate = result["certificate"]
    assert certificate["status"] == "not run" and "that takes 36" in certificate["reason"]
    assert result["metric_after"] == pytest.approx(1 - 13 / 20)
    assert result["drop"] == pytest.approx(17 / 20 - 13 / 20)
    passed = {row["what"]: row["passed"] for row in result["candidates"]}
    assert [what for what, held in passed.items() if not held] == [
        "sparsity 0.75",
        "3 shared weights per tensor, not tuned",
        "3 shared weights per tensor",
    ]


def test_a_metric_that_training_lowered_needs_a_goal(ours: None, tmp_path: Path) -> None:
    unknown = dataclasses.replace(task(), metric=error_of_task)
    said = r'lowered the error_of_task on the validation .*got 0.8 before, 0.2 after; allowed: goal="min"'
    PHASES.clear()
    with pytest.raises(InvalidArgument, match=said):
        kk.compress(unknown, out=tmp_path / "out", max_drop=0.1, progress=False)
    assert [phase.stage for phase in PHASES] == ["train"], "it is refused before it is pruned"
    higher = dataclasses.replace(unknown, goal="max")
    result = kk.compress(higher, out=tmp_path / "out", max_drop=0.1, progress=False)
    assert result["resumed"] and "lowered the error_of_task" in result["warnings"][0]


def test_points_are_no_share(tmp_path: Path) -> None:
    said = r"got 2; allowed: 0..1; 2 points are 0.02; 2 as a share would allow any network"
    with pytest.raises(InvalidArgument, match=said):
        kk.compress(task(), out=tmp_path / "out", max_drop=2)
    assert not (tmp_path / "out").exists()


def test_a_budget_that_allows_anything_of_a_share_is_said(ours: None, tmp_path: Path) -> None:
    """An error rate, an F1: shares that are not named accuracy."""
    rate = dataclasses.replace(task(), metric=error_of_task, goal="min")
    said = "if the error_of_task is a share of 0..1, the budget of 2 allows any network; 2 points are 0.02"
    result = kk.compress(rate, out=tmp_path / "out", max_drop=2, progress=False)
    assert said in result["warnings"]
    result = kk.compress(rate, out=tmp_path / "other", max_drop=0.9, progress=False)
    assert not any("points" in warning for warning in result["warnings"])


@pytest.mark.parametrize(
    ("validation", "held"), [(0.8, True), (0.7, True), (0.699999, False), (0.9, True), (0.6, False)]
)
def test_the_budget_is_held_up_to_its_end(validation: float, held: bool) -> None:
    search = ladder()
    dense = Finished("", search.dense, {"validation": 0.8})
    found = Finished("", Proposal.of(prune=[0.5]), {"validation": validation})
    assert search.passes(found, {search.dense: dense}) is held


def test_the_bar_counts_all_epochs_of_the_recipe() -> None:
    def epochs(**changes: Any) -> int:
        more = {"content": task().data(), "budgets": Budgets()}
        own = task(**changes)
        return epochs_of(SearchRequest(task=own, source=TaskSource(own), **more))

    assert epochs() == 2 + 4 * 1 + 3 * 1
    assert epochs(prune_epochs=7, tune_epochs=5, widths=(0.5, 0.25)) == 2 + 6 * 7 + 3 * 5


def row(name: str, k: int) -> dict[str, Any]:
    sizes = {"dense": 8_000 * k, "pruned": 3_000 * k, "quantized": 700 * k, "packed": 450 * k}
    facts = {"elements": 2_000 * k, "nonzero": 500 * k + 1, "sparsity": 0.7 + k / 100}
    words = {"codec": f"codec{k}", "quantizer": f"grid {k}", "shape": [k, 2000]}
    return {"name": name, **facts, **words, "bits_per_weight": 1.1 * k, "bytes": sizes}


RESULT: dict[str, Any] = {
    "task": "tiny",
    "framework": "torch",
    "network": "6-4",
    "seed": 3,
    "karikomi": "0.1",
    "metric": "accuracy",
    "metric_before": 0.91,
    "metric_after": 0.87,
    "validation_before": 0.93,
    "validation_after": 0.9,
    "max_drop": 0.035,
    "examples": {"train": 300, "validation": 100, "test": 250},
    "bytes_dense": 24_500,
    "bytes_packed": 1_900,
    "ratio": 12.9,
    "sparsity": 0.72,
    "parameters": 6_001,
    "nonzero": 1_503,
    "verified": True,
    "seconds": 41.25,
    "file": "runs/tiny/model.karikomi",
    "report": "runs/tiny/report.html",
    "bytes_by_cause": {
        **{"dense": 24_000, "pruned": 9_000, "quantized": 2_100, "packed": 1_350},
        "file": 1_900,
    },
    "tensors": [row("small", 1), row("large", 2)],
    "candidates": [
        {"stage": "prune", "what": "sparsity 0.5", "validation": 0.92, "passed": True},
        {"stage": "prune", "what": "sparsity 0.72", "validation": 0.91, "passed": True}
        | {"chosen": True},
        {"stage": "prune", "what": "sparsity 0.9", "validation": 0.7, "passed": False},
        {"stage": "quantize", "what": "16 shared", "validation": 0.89, "passed": False}
        | {"bytes": 2_345},
        {"stage": "quantize", "what": "32 shared", "validation": 0.9, "passed": True}
        | {"bytes": 1_987, "chosen": True},
    ],
    "clip": {"rule": "ByGlobalNorm(1.0)", "steps": 400, "clipped": 50, "skipped": 3},
    "shrink": {
        "widths_before": {"fc1": 256, "fc2": 128},
        "widths_after": {"fc1": 201, "fc2": 120},
        "removed": 63,
        "parameters_before": 50_826,
        "parameters_after": 40_156,
        **{"macs_before": 50_000, "macs_after": 30_000, "ms_before": 3.0, "ms_after": 2.0},
        "verdict": "1.50x faster: 3.00 -> 2.00 ms.",
        "together": {"fc1.weight": ["linear at net.py:3", "add at net.py:4"], "lonely": []},
    },
    **{"parameters_before": 50_826, "parameters_after": 40_156},
    **{"macs_before": 50_000, "macs_after": 30_000, "ms_before": 3.0, "ms_after": 2.0},
    "left_alone": {"norm": "weight of a norm"},
    "warnings": [],
    "environment": {"python": "3.11", "threads": 2},
}


def test_the_table_of_the_terminal_has_each_figure_in_its_place() -> None:
    lines = report.compress_table(RESULT).splitlines()
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert lines[0] == "tiny (torch, seed 3): 6-4"
    assert cells[1:11] == [
        ["before", "after"],
        ["accuracy (test)", "91.00 %", "87.00 %", "-4.00 points"],
        ["accuracy (validation)", "93.00 %", "90.00 %", "-3.00 points"],
        ["budget on validation", "3.50 points held"],
        ["size", "24.5 kB", "1.90 kB", "12.9x smaller"],
        ["numbers not zero", "6,001", "1,503"],
        ["sparsity", "72.0 %", "of prunable weights"],
        ["parameters in memory", "50,826", "40,156"],
        ["multiply-accumulates", "50,000", "30,000"],
        ["milliseconds a pass", "3", "2"],
    ]
    assert cells[12:15] == [
        ["tensor", "codec", "sparsity", "bits/weight", "dense", "packed"],
        ["large", "codec2", "72.0 %", "2.2", "16.0 kB", "900 B"],
        ["small", "codec1", "71.0 %", "1.1", "8.00 kB", "450 B"],
    ]
    assert "not pruned: norm: weight of a norm" in lines
    assert lines[-3].startswith("verified  yes: ")


@pytest.mark.parametrize(
    ("validation", "held"), [(0.895, "held"), (0.894, "NOT HELD"), (0.99, "held"), (None, "n/a")]
)
def test_table_and_page_judge_the_budget_alike(validation: float | None, held: str) -> None:
    result = RESULT | {"validation_after": validation}
    assert f"3.50 points {held}" in report.compress_table(result)
    page = Page(report.compress_page(result, []))
    said = {"held": "✓ held", "NOT HELD": "✗ not held", "n/a": "n/a"}[held]
    assert page.tiles["budget of 3.50 points"] == (said, "on the validation split")


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report.compress_page(RESULT, []))


def test_the_tiles_of_the_page(page: Page) -> None:
    assert page.title == "tiny: compressed 12.9x"
    assert page.lead == "6-4 (torch), seed 3, 41.2 s."
    assert page.tiles["smaller"] == ("12.9x", "24.5 kB → 1.90 kB")
    on_test = ("87.00 %", "before 91.00 %: -4.00 points")
    assert page.tiles["accuracy on the test split"] == on_test
    left = "of prunable weights; 1,503 of 6,001 numbers are left"
    assert page.tiles["sparsity"] == ("72.0 %", left)
    assert page.tiles["to run"] == ("✓ 1.50x faster", "3 → 2 ms")
    assert page.tiles["verified"][0] == "✓ yes"
    lost = Page(report.compress_page(RESULT | {"verified": False}, []))
    assert lost.tiles["verified"][0] == "✗ no"


def test_a_network_that_is_not_faster_is_said_first() -> None:
    slow = {"ms_before": 2.0, "ms_after": 1.95, "verdict": "Not faster (2 -> 1.95 ms): why."}
    page = Page(report.compress_page(RESULT | slow | {"shrink": RESULT["shrink"] | slow}, []))
    assert page.tiles["to run"] == ("✗ not faster", "2 → 1.95 ms")
    # The lead, the budget, and then this.
    assert page.sentences[2] == "Running it: Not faster (2 -> 1.95 ms): why."


def test_times_in_turn_are_the_only_ones(made: dict[str, Any]) -> None:
    page = Page(report.compress_page(made, []))
    assert page.tiles["to run"] == ("✓ 2x as fast", "20 → 10 ms")
    assert "Running it: 2.00x as fast (2.00 to 2.00): 20.00 -> 10.00 ms." in page.sentences


@pytest.mark.parametrize(
    ("low", "tile"), [(1.01, "✓ 1.2x as fast"), (1.0, "✗ not faster"), (0.9, "✗ not faster")]
)
def test_faster_is_what_an_interval_above_one_shows(low: float, tile: str) -> None:
    timed = {"ms_before": 3.0, "ms_after": 2.0, "faster": 1.2, "low": low, "high": 1.3}
    page = Page(report.compress_page(RESULT | {"timed": [timed]}, []))
    assert page.tiles["to run"] == (tile, "3 → 2 ms")


def test_times_of_another_engine_have_the_ratio_of_that_engine(made: dict[str, Any]) -> None:
    timed = [{**made["timed"][-1], "ms_before": 8.0, "ms_after": 7.0, "faster": 1.14}]
    text = report.compress_table({**made, "timed": timed, "ms_before": 6.0, "ms_after": 2.0})
    assert "3x as fast, integers in ONNX Runtime" in text and "1.14" not in text


def test_the_reason_why_nothing_was_shrunk_is_on_the_page() -> None:
    none = {"removed": 0, "left_alone": {"the network": "its code has a view at net.py:3"}}
    page = Page(report.compress_page(RESULT | {"shrink": none}, []))
    assert "the network was left alone: its code has a view at net.py:3." in " ".join(
        page.sentences
    )


def test_the_sentences_of_the_page(page: Page) -> None:
    text = " ".join(page.sentences)
    for said in (
        "The budget of 3.50 points was held on the validation split: 93.00 % before, 90.00 % after"
        " (-3.00 points).",
        "Examples: 300 train, 100 validation, 250 test."
        " One of the 250 test examples is worth 0.40 points of accuracy.",
        "at least 89.50 %: 93.00 % before, less the budget of 3.50 points.",
        "prune: sparsity 0.72 was chosen: 91.00 % is 1.50 points above the floor;"
        " below the floor: sparsity 0.9 (70.00 %).",
        "quantize: 32 shared (1.99 kB) was chosen: 90.00 % is 0.50 points above the floor;"
        " below the floor: 16 shared (89.00 %).",
        "ByGlobalNorm(1.0) clipped 50 of 400 steps (12.5 %) and skipped 3.",
        "Running it: 1.50x faster: 3.00 -> 2.00 ms.",
        "63 units were removed; parameters 50,826 → 40,156.",
        "fc1.weight: its units go together by linear at net.py:3; add at net.py:4.",
        "norm was not pruned: weight of a norm.",
    ):
        assert said in text, said


def test_of_many_predictions_per_example_one_is_worth_less() -> None:
    text = report.compress_page(RESULT | {"predictions": 1000}, [])
    assert "One of the 1,000 test predictions is worth 0.10 points of accuracy." in text


def test_the_tables_of_the_page(page: Page) -> None:
    assert [[*cells.values()] for cells in page.tables["Every tensor"]] == [
        ["large", "2x2000", "grid 2", "codec2", "1,001", "72.0 %", "2.2"]
        + ["16.0 kB", "6.00 kB", "1.40 kB", "900 B"],
        ["small", "1x2000", "grid 1", "codec1", "501", "71.0 %", "1.1"]
        + ["8.00 kB", "3.00 kB", "700 B", "450 B"],
    ]
    assert [*page.tables["Every tensor"][0]] == [
        *("tensor", "shape", "quantizer", "codec", "not zero", "sparsity", "bits per weight"),
        *("dense", "pruned", "quantized", "entropy coded"),
    ]
    assert [[*cells.values()] for cells in page.tables["In the order they were tried"]] == [
        ["prune", "sparsity 0.5", "92.00 %", "", "yes", ""],
        ["prune", "sparsity 0.72", "91.00 %", "", "yes", "✓ chosen"],
        ["prune", "sparsity 0.9", "70.00 %", "", "no", ""],
        ["quantize", "16 shared", "89.00 %", "2.35 kB", "no", ""],
        ["quantize", "32 shared", "90.00 %", "1.99 kB", "yes", "✓ chosen"],
    ]
    assert [text.split()[0] for text in page.strong] == ["prune", "quantize"]
    assert all("chosen" in text for text in page.strong)
    assert [[*cells.values()] for cells in page.tables["Costs"]] == [
        ["parameters in memory", "50,826", "40,156", "79.0 %"],
        ["multiply-accumulates", "50,000", "30,000", "60.0 %"],
        ["milliseconds a pass", "3", "2", "66.7 %"],
    ]
    assert [[*cells.values()] for cells in page.tables["Widths"]] == [
        ["fc1", "256", "201", "55"],
        ["fc2", "128", "120", "8"],
    ]
    assert [[*cells.values()] for cells in page.tables["Made with"]] == [
        ["python", "3.11"],
        ["threads", "2"],
    ]


def test_the_bars_of_the_page(page: Page) -> None:
    sizes = page.charts["Size after each step"]
    steps = {
        "dense": (24_000, None, "24.0 kB"),
        "pruned and shrunk": (9_000, 24_000, "9.00 kB, 37.5 % (saved 15.0 kB)"),
        "quantized": (2_100, 9_000, "2.10 kB, 8.8 % (saved 6.90 kB)"),
        "entropy coded": (1_350, 2_100, "1.35 kB, 5.6 % (saved 750 B)"),
        "the whole file": (1_900, None, "1.90 kB, 7.9 % (added 550 B)"),
    }
    assert [*sizes.rows] == [*steps]
    for name, (value, before, note) in steps.items():
        found = sizes.bar(name)
        assert found[0] == pytest.approx(value, abs=60), name
        assert found[1] == (before and pytest.approx(before, abs=60)), name
        assert found[2] == note
    assert "quantized 2.10 kB" in sizes.description
    shares = page.charts["Sparsity per layer"]
    assert [*shares.rows] == ["large", "small"]
    assert shares.bar("large")[::2] == (pytest.approx(72, abs=0.2), "72.0 % of 4,000")
    assert shares.bar("small")[::2] == (pytest.approx(71, abs=0.2), "71.0 % of 2,000")


def test_a_size_that_is_missing_keeps_the_outline_of_the_one_before() -> None:
    result = RESULT | {"bytes_by_cause": RESULT["bytes_by_cause"] | {"quantized": None}}
    sizes = Page(report.compress_page(result, [])).charts["Size after each step"]
    pruned = pytest.approx(9_000, abs=60)
    assert sizes.bar("quantized") == (None, pruned, "n/a")
    packed = (pytest.approx(1_350, abs=60), pruned, "1.35 kB, 5.6 % (saved 7.65 kB)")
    assert sizes.bar("entropy coded") == packed


def test_the_marks_of_the_page(page: Page) -> None:
    marks = page.charts["Size per tensor"]
    assert [*marks.rows] == ["large", "small"]
    assert marks.styles == {"dense": 0, "pruned": 1, "quantized": 2, "entropy coded": 3}
    for name, k in (("large", 2), ("small", 1)):
        sizes = [8_000 * k, 3_000 * k, 700 * k, 450 * k]
        assert marks.dots(name, 4, log=True) == pytest.approx(sizes, rel=0.01)


def test_costs_are_those_that_were_measured(made: dict[str, Any]) -> None:
    assert [row["examples"] for row in made["timed"]] == [1, 10], "no more than there are"
    assert (made["ms_before"], made["ms_after"]) == (20.0, 10.0)
    assert [row["faster"] for row in made["timed"]] == [2.0, 2.0]
    assert made["memory_before"] == made["memory_after"] == 10
    text = report.compress_table(made)
    assert "2x as fast (2 to 2)" in text and "peak bytes of a pass" in text
