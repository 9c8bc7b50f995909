"""What is said of time and memory before a search, and the verdict of a certificate that was not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import karikomi as kk  # noqa: E402
from karikomi.search.driver import Budgets  # noqa: E402
from karikomi.search.forecast import Forecast, forecast, peak_memory, said  # noqa: E402
from karikomi.search.run_reference import TaskSource  # noqa: E402
from karikomi.search.search_run import SearchRequest, epochs_of  # noqa: E402
from karikomi.tasks import Data, Recipe, Split, Task  # noqa: E402


def _split(count: int, seed: int) -> Split:
    targets = np.random.default_rng(seed).integers(0, 3, count)
    noise = np.random.default_rng(seed + 1).standard_normal((count, 6), dtype=np.float32)
    return Split(np.eye(3, 6, dtype=np.float32)[targets] * 6 + noise, targets)


def _net() -> Any:
    import torch

    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


RECIPE = Recipe(
    batch_size=20,
    learning_rate=1e-2,
    train_epochs=5,
    prune_epochs=1,
    sparsities=(),
    rates=(),
    entries=(16,),
    threads=1,
)


def _task(**changes: Any) -> Task:
    data = Data(_split(200, 0), _split(60, 1), _split(changes.pop("test", 300), 2))
    return Task(name="blobs", model=_net, data=lambda: data, recipe=RECIPE, **changes)


def _request(task: Task, **more: Any) -> SearchRequest:
    given = {"source": TaskSource(task), "content": task.data(), "budgets": Budgets()}
    return SearchRequest(task=task, **{**given, **more})


def test_the_time_of_the_training_and_the_memory_are_forecast() -> None:
    request = _request(_task())
    found = forecast(request)
    assert found is not None and found.steps == epochs_of(request) * 10 == 5 * 10
    assert 0 < found.seconds < 5 and found.memory is not None and found.memory > 1 << 26
    assert peak_memory() == found.memory or (peak_memory() or 0) > found.memory
    weights = {name: array for name, array in kk.torch.to_arrays(_net()).items()}
    assert forecast(_request(_task(), weights=weights, trains=False)) is None


def test_what_takes_less_than_a_minute_is_not_said() -> None:
    assert said(Forecast(100, 0.5)) is None and said(None) is None
    assert said(Forecast(1000, 0.6)) == "about 10 minutes of training (1,000 steps of 600 ms)"
    text = said(Forecast(1000, 0.6, workers=2, memory=2_000_000_000))
    assert (
        text is not None
        and text.startswith("about 5 minutes")
        and text.endswith("2.0 GB of memory each worker")
    )


def _root(outputs: np.ndarray, targets: np.ndarray) -> float:
    """Return what is no mean over examples."""
    return float(np.sqrt(np.mean(np.argmax(outputs, 1) == targets)))


@pytest.mark.parametrize(
    ("changes", "more", "verdict", "status"),
    [
        ({"test": 30}, {"max_drop": 0.05}, "undecided", "not run"),
        ({"metric": _root, "goal": "max"}, {"max_drop": 0.1}, "undecided", "not run"),
    ],
)
def test_what_was_not_shown_is_not_held(
    changes: dict[str, Any], more: dict[str, Any], verdict: str, status: str, tmp_path: Path
) -> None:
    result = kk.compress(_task(**changes), out=tmp_path / "o", progress=False, **more)
    certificate = result["certificate"]
    assert (result["verdict"], certificate["status"]) == (verdict, status), certificate
    assert certificate["asked"] and certificate["reason"]
