"""The example of pruning in Keras runs, and says what its page quotes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "keras_prune.py"


def test_keras_prune(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("keras")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    dense, pruned, *table, size = capsys.readouterr().out.splitlines()
    assert float(dense.split()[1].rstrip("%")) > 95
    assert float(pruned.split()[1].rstrip("%")) > 94 and "90.0% of the kernels" in pruned
    assert table[-1].split()[:4] == ["all", "8,525", "9,472", "90.0%"]
    assert int(size.split()[1].replace(",", "")) < 9472 / 8 + 400
