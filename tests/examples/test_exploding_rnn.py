"""The recurrent example runs, shows what clipping changed, and its clipped steps are bounded."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from depth import FULL

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "exploding_rnn.py"

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """Return the names of the example, which is not run."""
    return runpy.run_path(str(EXAMPLE))


class Here:
    """In place of the processes of the example, each of which would import torch."""

    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None: ...

    map = staticmethod(map)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return what the quick mode printed, and the folder it wrote; with its own two processes in a full run."""
    out = tmp_path_factory.mktemp("quick") / "new" / "folder"
    names, shown, threads = runpy.run_path(str(EXAMPLE)), io.StringIO(), torch.get_num_threads()
    if not FULL:
        names["main"].__globals__["ProcessPoolExecutor"] = Here
        call = ["exploding_rnn.py", "--quick", "--out", str(out)]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
            patch.setattr(sys, "argv", call)
            names["main"]()
        torch.set_num_threads(threads)
        return shown.getvalue(), out
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--quick", "--out", str(out)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, out


def test_quick_prints_one_row_per_arm_and_says_scaled_down(quick: tuple[str, Path]) -> None:
    title, names, *rows = quick[0].splitlines()
    assert "scaled down" in title
    assert names.split() == "length rate limit solved of median steps largest norm NaN runs".split()
    assert [row.split()[:3] for row in rows] == [["20", "0.3", "none"], ["20", "0.3", "1"]]


def test_only_with_clipping_the_quick_runs_solve_the_task(quick: tuple[str, Path]) -> None:
    rows = json.loads((quick[1] / "figures.json").read_text())["table"]
    assert [(row["solved"], row["of"]) for row in rows] == [(0, 2), (2, 2)]
    assert rows[0]["largest norm"] > 10.0


def test_figures_hold_every_run_and_the_plot_is_a_picture(quick: tuple[str, Path]) -> None:
    runs = json.loads((quick[1] / "figures.json").read_text())["runs"]
    assert [(run["limit"], run["seed"]) for run in runs] == [
        ("none", 0),
        ("none", 1),
        ("1", 0),
        ("1", 1),
    ]
    assert (quick[1] / "success.png").read_bytes().startswith(b"\x89PNG")


def test_a_training_is_a_function_of_its_seed(example: dict[str, Any]) -> None:
    threads = torch.get_num_threads()
    try:
        first, again, other = (
            example["trained"]((20, 0.3, "1", seed, 40))["largest_norm"] for seed in (3, 3, 4)
        )
    finally:
        torch.set_num_threads(threads)
    assert first == again != other


@pytest.mark.parametrize("length", [10, 30])
def test_a_clipped_step_is_at_most_rate_times_limit(example: dict[str, Any], length: int) -> None:
    rate = 0.25
    moved = {limit: step_from_a_cliff(example, length, rate, limit) for limit in (1.0, math.inf)}
    assert moved[1.0][0] == moved[math.inf][0] > 10.0
    assert moved[1.0][1] == pytest.approx(rate * 1.0, rel=1e-4)
    assert moved[math.inf][1] == pytest.approx(rate * moved[math.inf][0], rel=1e-4)


def step_from_a_cliff(
    example: dict[str, Any], length: int, rate: float, limit: float
) -> tuple[float, float]:
    """Return the gradient norm of large recurrent weights, and how far one step moved all parameters."""
    generator = torch.Generator().manual_seed(0)
    network = example["Network"](generator)
    with torch.no_grad():
        network.recurrent.mul_(4.0)
        network.outward.mul_(20.0)
    before = torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone()
    batch = example["sequences"](length, 20, generator)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate)
    norm = example["step"](network, optimizer, *batch, limit=limit)
    after = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    return norm, (after - before).double().norm().item()


def test_sequences_hold_two_marks_where_they_belong(example: dict[str, Any]) -> None:
    symbols, classes = example["sequences"](30, 500, torch.Generator().manual_seed(1))
    places, columns = torch.nonzero(symbols.T < 2, as_tuple=True)[::-1]
    early, late = places.reshape(500, 2).T
    assert columns.bincount().tolist() == [2] * 500
    assert set(early.tolist()) == {3, 4, 5} and set(late.tolist()) == {15, 16, 17}
    marks = symbols.T[columns, places].reshape(500, 2)
    assert torch.equal(classes, marks[:, 0] + 2 * marks[:, 1])
    assert classes.bincount().min() > 80
