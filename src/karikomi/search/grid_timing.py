"""What the machine alone decides, measured while nothing else is evaluated: the time of a step, and of a result."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from karikomi import registry
from karikomi.errors import BadFile, NonFinite
from karikomi.search.driver import Finished, LatencyTable
from karikomi.search.folder import Folder
from karikomi.search.grid_evaluation import one_thread_each
from karikomi.search.grid_run import phase_of
from karikomi.search.grid_setting import Setting
from karikomi.search.run_reference import OpenedRun
from karikomi.search.timed_recorder import TimedRecorder
from karikomi.tasks import Arrays, Data

DENSE = "dense"
BATCHES, EPOCHS = 8, 4
"""Steps of the short epochs that are timed, of which the first is not counted."""


class AloneTimes:
    """The two tables of a sweep folder: the step of each kind of setting, and the forward pass of each network form."""

    def __init__(self, folder: Path, opened: OpenedRun) -> None:
        self._folder, self._opened = folder, opened
        self._task = one_thread_each(opened.task)
        self._settings: dict[str, Setting] = {}
        self._files: dict[str, Path] = {}
        self._runner = registry.framework(self._task.framework).runner_for(
            self._task, opened.data, seed=0
        )
        machine = self._runner.environment()
        self._steps = LatencyTable(folder / "steps.json", machine, self._step)
        self._passes = LatencyTable(folder / "latency.json", machine, self._pass)

    @property
    def notes(self) -> list[str]:
        """What changed of the machine since an earlier call."""
        return [*self._steps.notes, *self._passes.notes]

    def measure(self, found: Sequence[Finished]) -> None:
        """Measure what the tables lack for these runs."""
        for item in found:
            setting, shapes = Setting.of(item.proposal), item.facts.get("shapes")
            self._settings[step_form(setting)] = setting
            self._steps.ms(step_form(setting))
            if shapes is not None:
                path = (self._folder / str(item.artefact)).with_suffix(".safetensors")
                self._files[shapes] = path
                self._passes.ms(shapes)
        self.dense()

    def dense(self) -> Mapping[str, float]:
        """Return ``ms``, and ``macs`` and ``parameters`` where they are known, of the whole network."""
        self._passes.ms(DENSE)
        return self._passes.rows[DENSE]

    def step(self, setting: Setting) -> Mapping[str, float]:
        """Return the milliseconds of a step, ``mean``, ``min`` and ``max`` of short epochs; nothing where unknown."""
        row = self._steps.rows[step_form(setting)]
        return {key: row[key] for key in ("mean", "min", "max") if key in row}

    def latency(self, shapes: str | None) -> float:
        """Return the milliseconds of a forward pass on up to 64 validation examples; of None the whole network's."""
        return self._passes.ms(shapes or DENSE)

    def _step(self, form: str) -> dict[str, float]:
        """Return the time of a step: the median in each of some short epochs after the first."""
        data, size = self._opened.data, self._task.recipe.batch_size
        some = Data(
            data.train.take(np.arange(min(len(data.train), size * BATCHES))),
            data.validation.take(np.arange(min(len(data.validation), 64))),
            data.test,
        )
        runner = registry.framework(self._task.framework).runner_for(self._task, some, seed=0)
        setting = self._settings[form]
        training = runner.train(runner.fresh(), phase_of(self._task, setting))
        medians = []
        with tempfile.TemporaryDirectory(prefix="karikomi-") as folder:
            recorder = TimedRecorder(Path(folder) / "steps.jsonl")
            with recorder:
                # A setting that diverges at once has no time.
                with suppress(NonFinite):
                    for _ in range(EPOCHS):
                        training.run_epoch(recorder)
                        if recorder.ms:
                            medians.append(statistics.median(recorder.ms))
                        recorder.ms.clear()
        if not medians[1:]:
            return {"ms": 0.0}
        counted = medians[1:]
        spread = {"mean": statistics.fmean(counted), "min": min(counted), "max": max(counted)}
        return {"ms": statistics.median(counted), **spread}

    def _pass(self, form: str) -> dict[str, float]:
        if form != DENSE:
            path = self._files[form]
            if not path.exists():
                raise BadFile(
                    "the network of a run is gone, and was not timed",
                    where=str(path),
                    hint="delete the folder, or choose another --out",
                )
            arrays, notes = Folder.stored(path)
            self._runner.adopt({name: str(text) for name, text in notes.items()})
            return {"ms": self._runner.milliseconds(arrays)}
        arrays: Arrays = self._runner.fresh()
        _, report = self._runner.shrink(arrays)
        known = {name: report.get(f"{name}_before") for name in ("macs", "parameters")}
        costs = {name: float(value) for name, value in known.items() if value is not None}
        return {"ms": self._runner.milliseconds(arrays), **costs}


def step_form(setting: Setting) -> str:
    """Return a digest of what the time of a step depends on: clip rule, bound, and whether it prunes."""
    parts = (setting.rule or "limit", setting.bound, bool(setting.sparsity))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
