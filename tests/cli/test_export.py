"""``karikomi export``: the report as text and JSON, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import karikomi as kk
from karikomi.cli.app import main

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxruntime", reason="needs the onnx extra")
pytest.importorskip("onnxscript", reason="needs the onnx extra")

TASK = """
import numpy as np
from torch import nn
from karikomi.tasks import Data, Split, Task

def split(size, seed):
    generator = np.random.default_rng(seed)
    return Split(generator.standard_normal((size, 6), np.float32), generator.integers(0, 3, size))

def network():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

task = Task(name="blobs", model=network, data=lambda: Data(split(100, 0), split(40, 1), split(40, 2)))
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Return the file of a task and a packed network of it, of 8 bits."""
    task = tmp_path / "blobs.py"
    task.write_text(TASK)
    network = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    kk.torch.quantize_(network, bits=8)
    return task, kk.save(network, tmp_path / "blobs.karikomi")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)], prog_name="karikomi")


def test_a_packed_network_runs_in_integers(files: Any, tmp_path: Path) -> None:
    task, packed = files
    out = tmp_path / "blobs.onnx"
    given = (packed, "--onnx", out, "--task", task)
    done = run(*given, "--int8", "--speed", "--json")
    assert (done.exit_code, done.exception) == (0, None), done.output
    found = json.loads(done.stdout)
    assert found["weights"] == ["0.weight", "2.weight"] and found["macs"] == 6 * 16 + 16 * 3
    assert found["macs_float"] == 0.0 and [row["runs"] for row in found["layers"]] == ["int8"] * 2
    assert [(row["name"], row["batch"]) for row in found["speed"]][:2] == [
        ("float32", 1),
        ("blobs.onnx", 1),
    ]
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(out).graph.initializer}
    again = kk.load(
        packed,
        into=torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)),
    )
    scale = stored["0.weight_scale"].reshape(-1, 1)
    assert (stored["0.weight_codes"] * scale == again[0].weight.detach().numpy()).all()
    text = run(*given)
    assert text.exit_code == 0 and "largest difference to the module" in text.stdout


def test_what_is_wrong_is_one_line(files: Any, tmp_path: Path) -> None:
    task, packed = files
    other = run(packed, "--onnx", tmp_path / "blobs.bin", "--task", task)
    assert other.exit_code == 1 and "a name ending in .onnx" in other.stderr
    gone = run(tmp_path / "gone.karikomi", "--onnx", tmp_path / "a.onnx", "--task", task)
    assert gone.exit_code == 1 and "there is no such file" in gone.stderr
    assert run(packed, "--onnx", tmp_path / "a.onnx").exit_code == 2


def test_the_choices_are_those_of_the_function() -> None:
    from karikomi.cli.export import CALIBRATIONS
    from karikomi.quantize import activation_ranges

    assert list(activation_ranges.CALIBRATIONS) == list(CALIBRATIONS)
