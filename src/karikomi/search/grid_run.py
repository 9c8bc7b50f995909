"""One run of a sweep: train once at one limit, sparsity and seed, and measure the result."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from karikomi.clip.by_global_norm import ByGlobalNorm
from karikomi.errors import NonFinite
from karikomi.pack import save
from karikomi.record import Recorder
from karikomi.search.candidates import shared_weights, stored
from karikomi.tasks import Arrays, Data, Phase, Runner, Task

ENTRIES = 16
"""Centroids per tensor in the file whose size is measured."""

MOST_TRAIN = 5_000
"""The number of leading training examples that the training metric is computed on."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of the grid and one seed; a limit of None clips nothing."""

    limit: float | None
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """The stem of the run's files."""
        return f"limit-{self.limit or 'none'}_sparsity-{self.sparsity}_seed-{self.seed}"


class TimedRecorder(Recorder):
    """A recorder that adds ``ms`` to each step's row: the time since the row of the step before.

    The first step of an epoch has none, because evaluation happens in between. Times are written and
    never read back for a decision.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.ms: list[float] = []
        self.steps = self.clipped = self.skipped = 0
        self._last: float | None = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; count it if it is a step."""
        now = time.perf_counter()
        if row.get("event") != "step":
            self._last = None
            super().write(row)
            return
        elapsed = None if self._last is None else 1e3 * (now - self._last)
        self._last = now
        if elapsed is not None:
            self.ms.append(elapsed)
        self.steps += 1
        self.clipped += bool(row.get("clipped"))
        self.skipped += bool(row.get("skipped"))
        super().write({**row, "ms": elapsed})


@dataclass(frozen=True, slots=True)
class Run:
    """One setting of a task's training, ready to be measured."""

    task: Task
    data: Data
    runner: Runner
    setting: Setting
    epochs: int

    def measure(self, record: Path, on_epoch: Callable[[], object]) -> dict[str, Any]:
        """Train by the task's recipe, write the record of steps, and return the run's figures.

        ``accuracy`` (the task's metric on the test split, whatever its name), ``train``, ``gap``
        (by how much the test split is worse), ``ms_per_step`` (median), ``bytes`` (packed, 16 shared values a
        tensor), and ``clipped``, ``skipped`` (shares of steps). A training that diverges ends the run, not
        the sweep: these figures are None then, and ``diverged`` is the reason.
        """
        record.unlink(missing_ok=True)
        recorder = TimedRecorder(record)
        with recorder:
            try:
                found = self.trained(recorder, on_epoch)
            except NonFinite as error:
                found = {
                    **dict.fromkeys(("accuracy", "train", "gap", "bytes")),
                    "diverged": str(error),
                }
        return {
            **found,
            "ms_per_step": statistics.median(recorder.ms) if recorder.ms else None,
            "clipped": recorder.clipped / recorder.steps if recorder.steps else None,
            "skipped": recorder.skipped / recorder.steps if recorder.steps else None,
        }

    def trained(self, recorder: Recorder, on_epoch: Callable[[], object]) -> dict[str, Any]:
        """Train, and return the figures of the network; raises `NonFinite` where it diverges."""
        training = self.runner.train(self.runner.fresh(), self._phase())
        while training.epoch < self.epochs:
            training.run_epoch(recorder)
            on_epoch()
        return self._figures(training.arrays())

    def _phase(self) -> Phase:
        limit, recipe = self.setting.limit, self.task.recipe
        return Phase(
            stage="train",
            epochs=self.epochs,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            clip=ByGlobalNorm(math.inf if limit is None else limit),
            sparsity=self.setting.sparsity or None,
        )

    def _figures(self, arrays: Arrays) -> dict[str, Any]:
        task, data = self.task, self.data
        some = data.train.take(np.arange(min(len(data.train), MOST_TRAIN)))
        test, train = (
            task.judge(self.runner.outputs(arrays, split.inputs), split.targets)
            for split in (data.test, some)
        )
        if task.assumes_goal:
            fresh = self.runner.outputs(self.runner.fresh(), some.inputs)
            task.check_direction(task.judge(fresh, some.targets), train, "train")
        if not (math.isfinite(test) and math.isfinite(train)):
            raise NonFinite(
                f"the {task.metric_name} is not finite", got=f"test {test}, train {train}"
            )
        return {
            "accuracy": test,
            "train": train,
            "gap": task.drop(train, test),
            "bytes": packed_bytes(arrays, self.runner.prunable()),
            "diverged": None,
        }


def packed_bytes(arrays: Arrays, names: list[str]) -> int:
    """Return the size of the packed file of a network whose named tensors share 16 values each.

    >>> packed_bytes({"w": np.zeros((100, 100), np.float32)}, ["w"]) < 400
    True
    """
    tensors = stored(arrays, shared_weights(arrays, names, ENTRIES))
    with tempfile.TemporaryDirectory(prefix="karikomi-") as folder:
        return save(tensors, Path(folder) / "size.karikomi").stat().st_size
