"""The exit codes of what the verbs judge: held, undecided, missed; trained weights, the front, two workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner, Result

pytest.importorskip("torch")

from karikomi.cli.app import main  # noqa: E402

TASK = """
import numpy as np
from torch import nn
from karikomi.tasks import Data, Recipe, Split, Task

def split(size, seed):
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, 3, size)
    noise = generator.standard_normal((size, 6), dtype=np.float32)
    return Split(np.eye(3, 6, dtype=np.float32)[targets] * 3 + noise, targets)

def network():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

task = Task(
    name="blobs",
    model=network,
    data=lambda: Data(split(200, 0), split(60, 1), split(90, 2)),
    recipe=Recipe(batch_size=20, learning_rate=1e-2, train_epochs=3, prune_epochs=1, tune_epochs=1,
                  sparsities=(0.5,), entries=(8, 4), rates=(4.0,), threads=1),
)
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], prog_name="karikomi")


def made(code: int, *arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a task and a finished run of it."""
    path = tmp_path_factory.mktemp("verdicts")
    (path / "blobs.py").write_text(TASK)
    call = ("compress", path / "blobs.py", "--max-drop", "0.1", "--out", path / "run", "--quiet")
    assert made(0, *call)["verdict"] == "held"
    return path


def test_a_missed_budget_ends_with_4_and_loses_nothing(folder: Path) -> None:
    dense = folder / "run" / "dense.safetensors"
    call = ("compress", folder / "blobs.py", "--from", dense, "--no-training", "--max-bytes", 10)
    found = made(4, *call, "--max-drop", "0.1", "--out", folder / "missed", "--quiet")
    assert (found["verdict"], found["binding"], found["training"]) == ("missed", "bytes", False)
    assert found["nearest_budgets"] and Path(found["file"]).exists()
    text = run(*call, "--max-drop", "0.1", "--out", folder / "missed", "--quiet")
    assert text.exit_code == 4 and "the limit on bytes was missed" in text.stdout
    page = (folder / "missed" / "report.html").read_text()
    assert "The limit on bytes was missed" in page and "--max-bytes 10" in page


def test_a_point_of_the_front_is_taken(folder: Path) -> None:
    call = (
        "compress",
        folder / "blobs.py",
        "--max-drop",
        "0.1",
        "--out",
        folder / "run",
        "--quiet",
    )
    first = made(0, *call)
    assert first["resumed"] and len(first["front"]) >= 1
    last = len(first["front"]) - 1
    found = json.loads(run(*call, "--take", last, "--json").stdout)
    assert found["taken"] == last and found["bytes_packed"] == first["front"][last]["bytes"]
    assert run(*call, "--take", last + 1).exit_code == 1
    made(0, *call)


def test_two_workers_give_the_same_bytes(folder: Path) -> None:
    call = ("compress", folder / "blobs.py", "--max-drop", "0.1", "--quiet", "--workers", 2)
    found = made(0, *call, "--out", folder / "two")
    for name in ("model.karikomi", "record.jsonl"):
        assert (folder / "two" / name).read_bytes() == (folder / "run" / name).read_bytes()
    first = json.loads((folder / "run" / "result.json").read_text())
    assert found["candidates"] == first["candidates"]


def test_gates_of_an_audit(folder: Path) -> None:
    files = (folder / "run" / "dense.safetensors", folder / "run" / "model.karikomi")
    call = ("audit", *files, "--task", folder / "blobs.py")
    held = made(0, *call, "--fail-if", "drop > 1", "--fail-if", "class_drop > 1")
    assert [gate["outcome"] for gate in held["gates"]] == ["held", "held"]
    missed = made(4, *call, "--fail-if", "drop > -1")
    assert missed["verdict"] == "missed"
    text = run(*call, "--fail-if", "drop > -1")
    assert text.exit_code == 4 and "gate      missed: drop>-1" in text.stdout
    assert run(*call, "--fail-if", "drop = 1").exit_code == 1
    assert "verdict" not in made(0, *call)


def test_a_population_and_markdown_for_a_pull_request(folder: Path, tmp_path: Path) -> None:
    dense = safetensors.numpy.load_file(folder / "run" / "dense.safetensors")
    rounded = {name: np.round(array * 4) / 4 for name, array in dense.items()}
    np.savez(tmp_path / "rounded.npz", **rounded)
    files = (folder / "run" / "dense.safetensors", tmp_path / "rounded.npz")
    call = ("audit", *files, "--task", folder / "blobs.py", "--most", 50)
    options = ("--population", 3, "--fail-if", "stable_flips>0.9", "--markdown", tmp_path / "a.md")
    found = made(0, *call, *options)
    assert found["population"]["after"] == 3 and found["population"]["drawn"]
    assert found["costs"]["bytes"] == [path.stat().st_size for path in files]
    text = (tmp_path / "a.md").read_text("utf-8")
    assert found["markdown"] == str(tmp_path / "a.md") and "| verdict | held | 1 gate |" in text
    assert "Of its " in text and found["command"] in text
    others = ("--replicate", files[1], "--original", files[0], "--original", files[0])
    named = made(0, *call, *others)["population"]
    assert (named["drawn"], named["before"], named["after"]) == (False, 3, 2)
    both = run(*call, "--population", 2, "--replicate", files[1])
    assert both.exit_code == 2 and "give one" in both.stderr


def test_what_was_not_measured_ends_with_3(folder: Path) -> None:
    (folder / "whole.py").write_text(TASK + _WHOLE)
    files = (folder / "run" / "dense.safetensors", folder / "run" / "model.karikomi")
    call = ("audit", *files, "--task", folder / "whole.py")
    found = made(3, *call, "--fail-if", "churn > 0.5")
    assert found["verdict"] == "undecided" and found["gates"][0]["value"] is None


_WHOLE = """
import dataclasses

def score(outputs, targets):
    return float(np.mean(outputs.argmax(1) == targets))

task = dataclasses.replace(task, metric=score, goal="max")
"""
