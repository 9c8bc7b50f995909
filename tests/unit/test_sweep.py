"""The sweep: its figures, and that a stopped one continues to the same result."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from karikomi import clip, record, report
from karikomi.clip.by_global_norm import ByGlobalNorm
from karikomi.errors import BadFile, InvalidArgument, UnknownName, Unsupported, Unwritable
from karikomi.search import grid, grid_run, timed_recorder
from karikomi.search.candidates import shared_weights, stored
from karikomi.search.driver import InlineExecutor, Proposal, Workers, drive
from karikomi.search.grid import sweep
from karikomi.search.grid_run import Run, packed_bytes
from karikomi.search.grid_setting import Setting
from karikomi.search.lock import lock
from karikomi.search.run_reference import _opened
from karikomi.search.timed_recorder import TimedRecorder
from karikomi.tasks import Data, Recipe, Split, Task

GRID: dict[str, Any] = {"limits": (1e-6, None), "sparsities": (0.0, 0.9), "seeds": 2, "epochs": 2}
STEPS = 2 * (200 // 20)


def _split(size: int, seed: int) -> Split:
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, 3, size)
    noise = generator.standard_normal((size, 6), dtype=np.float32)
    return Split(np.eye(3, 6, dtype=np.float32)[targets] * 3 + noise, targets)


def _data() -> Data:
    return Data(_split(200, 0), _split(60, 1), _split(80, 2))


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))


def _task(**changes: Any) -> Task:
    recipe = Recipe(batch_size=20, learning_rate=1e-2, train_epochs=4)
    known = {"name": "blobs", "model": _network, "data": _data, "recipe": recipe}
    return Task(**{**known, **changes})


TASK = _task()


def _untimed(result: dict[str, Any]) -> dict[str, Any]:
    timed = ("ms_per_step", "ms", "seconds_to_target")
    points = [{k: v for k, v in point.items() if k not in timed} for point in result["points"]]
    return {**result, "points": points}


def _facts(out: Path) -> dict[str, dict[str, Any]]:
    """Return what the journal has of each run, by the stem of its files."""
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()[1:]]
    return {Setting.of(Proposal.of(**line["proposal"])).name: line["facts"] for line in lines}


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    """A packed size that takes no time to find: `test_figures_sweep` has that of the file."""

    def deflated(tensors: Any) -> int:
        parts = (t.decode() if hasattr(t, "decode") else t for t in tensors.values())
        return len(zlib.compress(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid_run, "packed_bytes", deflated)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the result of a sweep that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    return out, sweep(_task(), **GRID, out=out, progress=False)


def test_every_point_of_the_grid_is_there(whole: tuple[Path, dict[str, Any]]) -> None:
    result = whole[1]
    at = [(point["limit"], point["sparsity"]) for point in result["points"]]
    assert at == [(1e-6, 0.0), (1e-6, 0.9), (None, 0.0), (None, 0.9)]
    assert (result["task"], result["metric"], result["seeds"]) == ("blobs", "accuracy", [0, 1])
    assert {"python", "torch", "threads", "karikomi"} <= result["environment"].keys()
    assert result["warnings"] == []
    for point in result["points"]:
        assert (point["runs"], point["diverged"]) == (2, 0)
        for key in ("accuracy", "gap", "ms_per_step", "bytes", "clipped"):
            stat = point[key]
            assert stat["min"] <= stat["mean"] <= stat["max"], key


def test_limits_and_sparsities_do_what_they_say(whole: tuple[Path, dict[str, Any]]) -> None:
    tiny, tiny_sparse, free, free_sparse = whole[1]["points"]
    assert tiny["clipped"]["min"] == tiny_sparse["clipped"]["min"] == 1.0
    assert free["clipped"]["max"] == free_sparse["clipped"]["max"] == 0.0
    assert free["accuracy"]["mean"] > 0.8
    assert free_sparse["bytes"]["max"] < free["bytes"]["min"]


def test_a_run_is_measured_as_it_says(whole: tuple[Path, dict[str, Any]]) -> None:
    """The figures of one run, made again here from the task and the record of steps."""
    out, result = whole
    name = "limit-none_sparsity-0.9_seed-1"
    (run,) = _facts(out)[name]["results"]
    assert run["gap"] == run["train"] - run["accuracy"]
    rows = list(record.read(out / "runs" / f"{name}.jsonl"))
    steps = [row for row in rows if row["event"] == "step"]
    times = [row["ms"] for row in steps if row["ms"] is not None]
    assert len(steps) == STEPS
    assert len(times) == STEPS - 2, "the first step of an epoch has no step before it"
    assert all(time > 0 for time in times)
    assert all(row["norm"] > 0 and row["factor"] == 1 for row in steps)
    assert steps[-1]["sparsity"] == pytest.approx(0.9, abs=0.01)
    point = result["points"][3]
    assert point["accuracy"]["min"] <= run["accuracy"] <= point["accuracy"]["max"]


def test_each_seed_is_a_training_of_its_own(whole: tuple[Path, dict[str, Any]]) -> None:
    losses = []
    for seed in (0, 1):
        rows = record.read(whole[0] / "runs" / f"limit-none_sparsity-0.0_seed-{seed}.jsonl")
        losses.append(next(row["loss"] for row in rows if row["event"] == "step"))
    assert losses[0] != losses[1]


def test_the_folder_and_the_page(whole: tuple[Path, dict[str, Any]]) -> None:
    out, result = whole
    assert json.loads((out / "sweep.json").read_text()) == json.loads(json.dumps(result))
    assert len(list((out / "runs").glob("*.jsonl"))) == 8 and len(_facts(out)) == 8
    assert "sparsity 90 %" in report.sweep_page(result)
    lines = report.sweep_table(result).splitlines()
    assert [line.split()[0] for line in lines[-6:-2]] == ["1e-06", "1e-06", "none", "none"]
    assert result["answer"]["sentences"][0] in " ".join(" ".join(lines).split())


class _Interrupted(BaseException):
    """Stands for a key or a kill: nothing in the package catches it."""


def _measure_at_most(monkeypatch: pytest.MonkeyPatch, most: float) -> list[Setting]:
    """Let `most` runs finish, and stop the one after them in its second epoch."""
    measured: list[Setting] = []
    plain = Run.measure

    def measure(self: Run, path: Path, on_epoch: Callable[[], object]) -> dict[str, Any]:
        def stop() -> Iterator[None]:
            yield
            raise _Interrupted

        ticks = stop()
        late = len(measured) >= most
        measured.append(self.setting)
        return plain(self, path, (lambda: next(ticks)) if late else on_epoch)

    monkeypatch.setattr(Run, "measure", measure)
    return measured


def test_more_seeds_and_settings_are_added_to_what_is_done(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {**GRID, "limits": (None,), "seeds": 1}
    sweep(_task(), **few, out=tmp_path, progress=False)
    measured = _measure_at_most(monkeypatch, math.inf)
    result = sweep(_task(), **GRID, out=tmp_path, progress=False)
    assert len(measured) == 6
    assert _untimed(result) == _untimed(whole[1])


def test_a_run_depends_on_neither_worker_nor_order(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers' places in this process, in the reverse order, each run with its task loaded anew.

    `benchmarks/sweep_workers.py` has real processes, and kills them.
    """
    submitted: list[Any] = []

    def submit(self: Workers, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        _opened.clear()
        submitted.append(args)
        return InlineExecutor().submit(fn, *args, **kwargs)

    def backwards(strategy: Any, evaluate: Any, **more: Any) -> Any:
        strategy._proposals = strategy._proposals[::-1]
        return drive(strategy, evaluate, **more)

    monkeypatch.setattr(Workers, "submit", submit)
    monkeypatch.setattr(grid, "drive", backwards)
    torch.manual_seed(123)
    result = sweep(f"{__name__}:TASK", **GRID, workers=2, out=tmp_path, progress=False)
    assert len(submitted) == 8
    assert _untimed(result) == _untimed(whole[1])
    assert _facts(tmp_path) == _facts(whole[0])


def test_a_task_that_workers_cannot_get_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be sent to other processes"):
        sweep(
            _task(loss=lambda o, t: nn.functional.cross_entropy(o, t)),
            **{**GRID, "sparsities": (0.0,)},
            workers=2,
            out=tmp_path / "b",
            progress=False,
        )


def test_the_folder_of_an_earlier_version_is_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "configuration.json").write_text('{"task": "blobs", "limits": [1.0]}')
    with pytest.raises(Unsupported, match="earlier version.*choose another --out"):
        sweep(_task(), **GRID, out=tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["configuration.json"]


def test_rules_bounds_rates_and_bits_are_axes(tmp_path: Path) -> None:
    result = sweep(
        _task(),
        limits=(None,),
        rules=(clip.Chain(clip.AutoClip(20.0), ByGlobalNorm(1.0)),),
        bounds=(None, "MaxNorm(0.001)"),
        rates=(None, 1e-9),
        sparsities=(0.0,),
        bits=(None, 2),
        seeds=1,
        epochs=3,
        out=tmp_path,
        progress=False,
    )
    points = {
        (p["limit"], p["rule"], p["bound"], p["rate"], p["bits"]): p for p in result["points"]
    }
    assert len(points) == 2 * 2 * 2 * 2 and len(list((tmp_path / "runs").glob("*.jsonl"))) == 8
    rule = "Chain(AutoClip(20.0), ByGlobalNorm(1.0))"
    assert [*dict.fromkeys(key[1] for key in points)] == [None, rule]
    plain = points[None, None, None, None, None]
    # A rate of 1e-9 learns nothing, a bound of 0.001 leaves no signal, and 2 bits are fewer bytes than 16 values.
    assert points[None, None, None, 1e-9, None]["loss"]["mean"] > plain["loss"]["mean"] + 0.2
    bounded = points[None, None, "MaxNorm(0.001)", None, None]
    assert bounded["loss"]["mean"] > 1.0 > plain["loss"]["mean"]
    assert points[None, None, None, None, 2]["bytes"]["mean"] < plain["bytes"]["mean"]
    assert points[None, rule, None, None, None]["clipped"]["mean"] > plain["clipped"]["mean"] == 0.0
    page, lines = report.sweep_page(result), report.sweep_table(result).splitlines()
    assert "MaxNorm(0.001)" in page and max(map(len, lines)) <= 80
    said = result["answer"]["sentences"]
    assert any(text.startswith("Bound MaxNorm(0.001) cannot be judged") for text in said)


@pytest.mark.parametrize("finished", [3])
def test_a_stopped_sweep_continues(
    finished: int,
    whole: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        _measure_at_most(patch, finished)
        with pytest.raises(_Interrupted):
            sweep(_task(), **GRID, out=tmp_path, progress=False)
    assert not (tmp_path / "sweep.json").exists()
    measured = _measure_at_most(monkeypatch, math.inf)
    result = sweep(_task(), **GRID, out=tmp_path, progress=False)
    assert len(measured) == 8 - finished
    assert _untimed(result) == _untimed(whole[1])
    for path in (tmp_path / "runs").glob("*.jsonl"):
        steps = [row for row in record.read(path) if row["event"] == "step"]
        assert len(steps) == STEPS, "rows of the stopped run are not kept"
    measured.clear()
    assert sweep(_task(), **GRID, out=tmp_path, progress=False) == result
    assert measured == []


@pytest.mark.parametrize(
    ("changes", "task", "named"),
    [
        ({}, {"name": "other"}, "task"),
        ({}, {"recipe": Recipe(batch_size=20, learning_rate=1e-3)}, "recipe"),
        (
            {},
            {
                "recipe": Recipe(
                    batch_size=20, learning_rate=1e-2, train_epochs=4, clip=ByGlobalNorm(9.0)
                )
            },
            "recipe",
        ),
        ({}, {"data": lambda: Data(_split(200, 9), _split(60, 1), _split(80, 2))}, "data"),
        ({}, {"model": lambda: nn.Sequential(nn.Linear(6, 3))}, "network"),
    ],
)
def test_another_sweep_in_the_folder_is_refused(
    changes: dict[str, Any],
    task: dict[str, Any],
    named: str,
    whole: tuple[Path, dict[str, Any]],
) -> None:
    before = (whole[0] / "sweep.json").read_bytes()
    with pytest.raises(Unsupported, match=rf"different: [\w, ]*\b{named}\b"):
        sweep(_task(**task), **{**GRID, **changes}, out=whole[0], progress=False)
    assert (whole[0] / "sweep.json").read_bytes() == before


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    small = {**GRID, "limits": (None,), "seeds": 1, "epochs": 1}
    sweep(_task(), **small, out=tmp_path, progress=False)
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"steps":10', b'"steps":11', 1))
    with pytest.raises(BadFile, match="line 2 of the journal is damaged"):
        sweep(_task(), **small, out=tmp_path, progress=False)


def _diverging(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.sum() * math.nan


def test_a_training_that_diverges_is_counted_and_named(tmp_path: Path) -> None:
    grid = {"limits": (1.0,), "sparsities": (0.0,), "seeds": 2, "epochs": 2}
    result = sweep(_task(loss=_diverging), **grid, out=tmp_path, progress=False)
    (point,) = result["points"]
    assert (point["runs"], point["diverged"]) == (0, 2)
    assert point["accuracy"] == {"mean": None, "min": None, "max": None}
    assert len(result["warnings"]) == 2
    assert result["warnings"][0].startswith("limit 1, sparsity 0, seed 0: diverged")
    assert "non-finite" in result["warnings"][0]
    assert "n/a" in report.sweep_table(result)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"limits": (-1.0,)}, "limit"),
        ({"limits": (0,)}, "limit"),
        ({"limits": (math.nan,)}, "limit"),
        ({"limits": ("1",)}, "limit"),
        ({"limits": ()}, "limits are empty"),
        ({"limits": (None, math.inf)}, "repeat"),
        ({"sparsities": (1.2,)}, "1.2"),
        ({"sparsities": (0.5, 0.5)}, "repeat"),
        ({"sparsities": ()}, "sparsities are empty"),
        ({"rules": ("AutoClip(",)}, "not a clip"),
        ({"rules": ("MaxNorm(1.0)",)}, "unknown clip"),
        ({"rules": (3,)}, "not a clip rule"),
        ({"rules": ("BlockRMS(1.0)",)}, "acts on other tensors"),
        ({"bounds": ("ByNorm(1.0)",)}, "unknown bound"),
        ({"bounds": (None, None)}, "bounds are empty or repeat"),
        ({"rates": (0.0,)}, "learning rate"),
        ({"rates": (math.inf,)}, "learning rate"),
        ({"bits": (1,)}, "bits"),
        ({"bits": (4.0,)}, "bits"),
        ({"workers": 0}, "workers"),
        ({"workers": True}, "workers"),
        ({"target": math.nan}, "target"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": 1.5}, "seeds"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_a_grid_out_of_range_is_refused_before_anything_is_written(
    changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises((InvalidArgument, UnknownName), match=match):
        sweep(_task(), **{**GRID, **changes}, out=tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unwritable, match="file"):
        sweep(_task(), **GRID, out=tmp_path / "file", progress=False)


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(_task(), limits=(1.0,), sparsities=(0.0,), seeds=1, epochs=2, out=tmp_path)
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "2/2" in seen.err


def test_steps_are_timed_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.25, 9.0, 20.0, 20.5])
    monkeypatch.setattr(timed_recorder, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    recorder = TimedRecorder(tmp_path / "record.jsonl")
    with recorder:
        for event, clipped in [("step", True), ("step", False), ("epoch", None)]:
            recorder.write({"event": event, "clipped": clipped})
        for _ in range(2):
            recorder.write({"event": "step", "clipped": False})
    assert recorder.ms == [250.0, 500.0]
    assert (recorder.steps, recorder.clipped) == (4, 1)


def test_the_size_counts_shared_values_and_the_rest_as_it_is() -> None:
    generator = np.random.default_rng(0)
    arrays = {"w": generator.normal(size=(100, 100)).astype(np.float32)}
    arrays["b"] = generator.normal(size=(1000,)).astype(np.float32)
    coded = stored(arrays, shared_weights(arrays, ["w"], 16))
    alone, both = packed_bytes({"w": coded["w"]}), packed_bytes(coded)
    assert 10_000 * 3 / 8 < alone < 10_000 * 4.2 / 8
    assert 3_000 < both - alone < 4_200


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(Unsupported, match="another process is at work"):
        sweep(_task(), **GRID, out=tmp_path, progress=False)
    assert not (tmp_path / "runs").exists()


def _loss_of_task(outputs: np.ndarray, targets: np.ndarray) -> float:
    return float(np.mean(np.argmax(outputs, axis=1) != targets))


def test_a_metric_that_training_lowered_needs_a_goal_in_a_sweep(tmp_path: Path) -> None:
    grid = {"limits": (1.0,), "sparsities": (0.0,), "seeds": 1, "epochs": 2, "progress": False}
    with pytest.raises(
        InvalidArgument, match='lowered the _loss_of_task on the train .*goal="min"'
    ):
        sweep(_task(metric=_loss_of_task), **grid, out=tmp_path / "a")
    found = sweep(_task(metric=_loss_of_task, goal="min"), **grid, out=tmp_path / "b")
    right = sweep(_task(), **grid, out=tmp_path / "c")
    wrong, share = (result["points"][0]["accuracy"]["mean"] for result in (found, right))
    assert found["goal"] == "min" and wrong == pytest.approx(1 - share)
    # The gap of an error rises as that of an accuracy does: by how much the test split is worse.
    gaps = [result["points"][0]["gap"]["mean"] for result in (found, right)]
    assert gaps[0] == pytest.approx(gaps[1])
