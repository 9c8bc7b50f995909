"""Every example runs, and says what its page quotes."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import karikomi as kk
from depth import FULL

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, **shorter: Any) -> None:
    """Run an example; `shorter` are constants of it for which a run ends sooner, used unless the run is full."""
    names = runpy.run_path(str(EXAMPLES / name))
    assert set(shorter) <= set(names)
    if not FULL:
        names["main"].__globals__.update(shorter)
    names["main"]()


def test_bounds_and_bits(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    run("bounds_and_bits.py", EPOCHS=16)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    table = {
        " ".join(row[:-6]): [float(cell.replace(",", "")) for cell in row[-6:]] for row in rows
    }
    assert table["weights bounded"][0] <= 0.25
    assert table["weights bounded"][3] < table["nothing"][3]
    assert abs(table["weights pruned"][4] - 90.0) < 0.1
    assert table["weights pruned"][5] < 0.25 * table["nothing"][5]


def test_numpy_network_prints_what_each_stage_costs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    run("numpy_network.py", STEPS=1_000, PRUNE=kk.prune.Gradual(0.9, steps=(250, 750), every=25))
    rows = capsys.readouterr().out.splitlines()[1:]
    table = {
        row[:23].strip(): [float(cell) for cell in row[23:].replace(",", "").rstrip("x").split()]
        for row in rows
    }
    zeros, right, size, _ = zip(*table.values(), strict=True)
    assert list(table)[::2] == ["dense", "pruned", "pruned, 16 values"]
    assert zeros[0] == 0.0 and zeros[2] == zeros[4] == 90.0
    assert right[0] >= 96.0 and min(right) >= 95.0
    assert sorted(size, reverse=True) == list(size) and size[4] < size[0] / 15


def test_numpy_network_has_the_gradients_of_its_loss() -> None:
    pytest.importorskip("sklearn")
    names = runpy.run_path(str(EXAMPLES / "numpy_network.py"))
    rng = np.random.default_rng(0)
    layers = [{n: a.astype(np.float64) for n, a in one.items()} for one in names["fresh"](0)]
    inputs, classes = rng.normal(size=(5, 64)), rng.integers(10, size=5)

    def loss() -> float:
        logits = names["forward"](layers, inputs)[-1]
        log_sums = np.log(np.exp(logits).sum(axis=1))
        return float(np.mean(log_sums - logits[np.arange(5), classes]))

    found = names["gradients"](layers, inputs, classes)
    for layer, own in zip(layers, found, strict=True):
        for name, array in layer.items():
            assert own[name].shape == array.shape
            place = np.unravel_index(np.argmax(np.abs(own[name])), array.shape)
            ends = []
            for offset in (1e-6, -2e-6):
                array[place] += offset
                ends.append(loss())
            array[place] += 1e-6
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(own[name][place], rel=1e-5)


def test_lightning_clip(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning.pytorch")
    runpy.run_path(str(EXAMPLES / "lightning_clip.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    without, clipped = ([float(cell) for cell in row[-3:]] for row in rows)
    assert without[0] < 50 < 75 < clipped[0] and without[1] == 0 < clipped[1]


def test_torch_norm_and_value(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    runpy.run_path(str(EXAMPLES / "torch_norm_and_value.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    table = {" ".join(row[:-3]): [float(cell) for cell in row[-3:]] for row in rows}
    assert table.pop("nothing")[0] < 50
    assert all(right > 75 and clipped > 50 for right, clipped, _ in table.values())
    assert table["by norm, weights by value"][2] <= 0.5


def test_optax_training(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optax")
    runpy.run_path(str(EXAMPLES / "optax_training.py"), run_name="__main__")
    first, second, third = capsys.readouterr().out.splitlines()
    assert float(first.split()[3]) > 85 and float(first.split()[6]) > 10
    assert float(second.split()[-1]) <= 2.001
    assert third.startswith("last step: pre ")


def test_keras_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("keras")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "keras_fit.py"), run_name="__main__")
    plain, clipped, counts, leader = capsys.readouterr().out.splitlines()
    assert float(plain.split()[2].rstrip("%")) < 20 < 90 < float(clipped.split()[2].rstrip("%;"))
    assert counts.startswith("karikomi: 264 steps, ") and " 12 skipped; " in counts
    assert "contributed most" in leader
    assert "12 were skipped" in (tmp_path / "runs/digits.html").read_text(encoding="utf-8")


def test_tensorflow_loop(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorflow")
    runpy.run_path(str(EXAMPLES / "tensorflow_loop.py"), run_name="__main__")
    without, clipped = (line.split() for line in capsys.readouterr().out.splitlines())
    assert float(without[2]) < 85 < float(clipped[2])
    assert float(without[5]) == 0 < float(clipped[5])


def test_prune_and_recover(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    runpy.run_path(str(EXAMPLES / "prune_and_recover.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    dense, random, magnitude, refitted = (float(line.split()[1].rstrip("%")) for line in lines[:4])
    assert random < magnitude < refitted and refitted > dense - 5
    assert float(lines[-1].split()[-1].rstrip("%")) > dense - 3
    assert any("least harm once re-fitted" in line for line in lines[4:])
