"""The benchmark of one GPU runs from end to end without one, on tiny sizes, and says that it measured nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Any:
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules["gpu"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_only_the_dry_run_runs(gpu: Any, capsys: Any) -> None:
    assert gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert gpu.main(["--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "NOT measured" in text and "NOT the exact number" not in text
    rows = [line for line in text.splitlines() if line.startswith(ROWS)]
    assert len(rows) == 10 and sum(" unseen " in f"{row} " for row in rows) == 3


ROWS = ("By", "clip_", "prune_", "training step", "forward", "quantize_")


def test_the_ratio_is_the_median_of_pairs_and_a_sync_fails(gpu: Any, monkeypatch: Any) -> None:
    row = gpu.Row("ours", "theirs", {"karikomi": [1.0, 2.0, 9.0], "peer": [1.0, 4.0, 3.0]})
    assert str(row).split()[-3:] == ["2000.000", "3000.000", "1.00"]
    bench = gpu.Bench(torch.device("cpu"), gpu.DRY)

    def waits() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    calls = iter([None] * 3)
    assert bench.sync_of(lambda: next(calls, None) or None) == "unseen"
    steps = iter([lambda: None] * 3 + [waits])
    assert bench.sync_of(lambda: next(steps)()) == "SYNC"
    monkeypatch.setattr(gpu, "LANES", (lambda own: own.rows.append(gpu.Row("", "", {}, "SYNC")),))
    assert gpu.main(["--dry-run"]) == 1
