"""What a search will take, said before it begins: the time of its training, and its memory."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from karikomi import registry
from karikomi.record import Recorder
from karikomi.search.search_run import SearchRequest, epochs_of
from karikomi.tasks import Data, Phase

_WORTH_SAYING = 60.0
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """`steps` of training by the recipe, the `seconds` of one, and the `memory` in bytes of this process, at most."""

    steps: int
    seconds: float
    workers: int = 1
    memory: int | None = None

    @property
    def total(self) -> float:
        """Seconds of all steps, on all workers at once."""
        return self.steps * self.seconds / self.workers

    def sentence(self) -> str:
        """Return it in words.

        >>> Forecast(30_000, 0.02, memory=1_500_000_000).sentence()
        'about 10 minutes of training (30,000 steps of 20 ms), and 1.5 GB of memory'
        """
        minutes = f"about {self.total / 60:.0f} minutes of training"
        each = f"({self.steps:,} steps of {1e3 * self.seconds:.0f} ms)"
        memory = "" if self.memory is None else f", and {self.memory / 1e9:.1f} GB of memory"
        return f"{minutes} {each}{memory if self.workers == 1 else f'{memory} each worker'}"


def forecast(request: SearchRequest) -> Forecast | None:
    """Measure one step of training, with the dense network beside it, and return what the search takes.

    None where nothing is trained. A candidate that is dropped early, and a network that became smaller, take less; a
    structure of which no file holds takes more.
    """
    recipe, content = request.task.recipe, request.content
    epochs = epochs_of(request)
    if not epochs:
        return None
    size = min(len(content.train), recipe.batch_size)
    few = Data(content.train.take(np.arange(size)), content.validation, content.test)
    runner = registry.framework(request.task.framework).runner_for(
        request.task, few, seed=request.seed
    )
    arrays = runner.fresh() if request.weights is None else dict(request.weights)
    rate = recipe.learning_rate
    phase = Phase(stage="forecast", epochs=3, learning_rate=rate, clip=recipe.clip, teacher=arrays)
    training = runner.train(arrays, phase)
    with tempfile.TemporaryDirectory(prefix="karikomi-") as path:
        with Recorder(Path(path) / "record.jsonl") as recorder:
            # The first steps are slower; of each the judgement on the validation split is taken off.
            taken = [_timed(lambda: training.run_epoch(recorder)) for _ in range(3)][1:]
    judged = _timed(lambda: runner.outputs(arrays, content.validation.inputs))
    steps = epochs * max(len(content.train) // recipe.batch_size, 1)
    seconds = max(min(taken) - judged, 0.1 * min(taken))
    return Forecast(steps, seconds, request.workers, peak_memory())


def said(found: Forecast | None) -> str | None:
    """Return the sentence of a forecast that is worth saying: of a minute or more."""
    return found.sentence() if found is not None and found.total >= _WORTH_SAYING else None


def peak_memory() -> int | None:
    """Return the largest resident size of this process so far in bytes, or None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
