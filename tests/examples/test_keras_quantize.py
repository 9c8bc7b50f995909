"""The example of quantization in Keras runs, and prints accuracies and bytes of what it saved and loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "keras_quantize.py"


def test_keras_quantize(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("keras")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("keras_quantize", EXAMPLE)
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "EPOCHS", 5)
    monkeypatch.setattr(example, "WIDTHS", (4,))
    example.main()
    dense, nearest, compensated = capsys.readouterr().out.splitlines()
    right = [float(line.split(": ")[1].split("%")[0]) for line in (dense, nearest, compensated)]
    sizes = [int(line.split(", ")[-1].split()[0].replace(",", "")) for line in (dense, nearest)]
    assert right[0] > 80 and min(right[1:]) > right[0] - 3
    assert sizes[0] == 69_864 and sizes[1] < sizes[0] / 7
    assert (tmp_path / "runs" / "digits.karikomi").is_file()
