"""One run of a sweep: train once at one setting and seed, and measure the result."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from karikomi.errors import NonFinite
from karikomi.files import tensor_file, write_bytes
from karikomi.pack import save
from karikomi.quantize import quantizer_for
from karikomi.search.candidate_work import form_of
from karikomi.search.candidates import Stored, decoded, shared_weights, stored
from karikomi.search.grid_setting import Setting
from karikomi.search.timed_recorder import TimedRecorder
from karikomi.tasks import Arrays, Data, Phase, Runner, Task

ENTRIES = 16
"""Centroids per tensor in the file whose size is measured where no bits are asked for."""

MOST_TRAIN = 5_000
"""The number of leading training examples that the training metric is computed on."""

FIGURES = ("accuracy", "train", "gap", "bytes")


@dataclass(frozen=True, slots=True)
class Run:
    """One setting of a task's training, ready to be measured."""

    task: Task
    data: Data
    runner: Runner
    setting: Setting

    def measure(self, record: Path, on_epoch: Callable[[], object]) -> dict[str, Any]:
        """Train by the task's recipe, write the record of steps, and return the run's figures.

        ``results``: for each size of `Setting.bits`, ``validation``, ``accuracy`` (the task's metric on the validation
        and the test split, whatever its name), ``train``, ``gap`` (by how much the test split is worse), and ``bytes``
        (packed; without bits with 16 shared values a tensor). ``epochs``: the validation metric after each.
        ``loss``: the mean of the last epoch. ``clipped``, ``skipped``: shares of steps. ``parameters``, ``macs``:
        of the network without units that pruning left dead, None without pruning; ``shapes``: its form, where it is
        smaller. A training that diverges ends the run, not the
        sweep: ``diverged`` is the reason and ``steps`` the step; its ``validation`` is that of the untrained network,
        all that it is worth, and the other figures are None.
        """
        record.unlink(missing_ok=True)
        recorder = TimedRecorder(record)
        with recorder:
            try:
                found = self.trained(recorder, on_epoch, record.with_suffix(".safetensors"))
            except NonFinite as error:
                found = self._lost(error)
        return {
            **found,
            "steps": recorder.steps,
            "epochs": [row["validation"] for row in recorder.epochs],
            "clipped": recorder.clipped / recorder.steps if recorder.steps else None,
            "skipped": recorder.skipped / recorder.steps if recorder.steps else None,
        }

    def trained(
        self, recorder: TimedRecorder, on_epoch: Callable[[], object], small: Path | None = None
    ) -> dict[str, Any]:
        """Train, and return the figures of the network; raises `NonFinite` where it diverges.

        `small`: where the network without its dead units is written, if it has any.
        """
        training = self.runner.train(self.runner.fresh(), phase_of(self.task, self.setting))
        while training.epoch < self.setting.epochs:
            training.run_epoch(recorder)
            on_epoch()
        arrays = training.arrays()
        self._check_direction(arrays)
        return {
            "results": [self._figures(arrays, bits) for bits in self.setting.bits],
            "loss": recorder.epochs[-1]["loss"],
            "diverged": None,
            **self._smaller(arrays, small),
        }

    def _lost(self, error: NonFinite) -> dict[str, Any]:
        validation = self.data.validation
        outputs = self.runner.outputs(self.runner.fresh(), validation.inputs)
        worst = self.task.judge(outputs, validation.targets)
        none = dict.fromkeys(FIGURES)
        return {
            "results": [{"bits": bits, "validation": worst, **none} for bits in self.setting.bits],
            **dict.fromkeys(("loss", "parameters", "macs", "shapes")),
            "diverged": str(error),
        }

    def _figures(self, arrays: Arrays, bits: int | None) -> dict[str, Any]:
        task, data = self.task, self.data
        tensors = self._rounded(arrays, bits)
        judged = arrays if bits is None else decoded(tensors)
        validation, test, train = (
            task.judge(self.runner.outputs(judged, split.inputs), split.targets)
            for split in (data.validation, data.test, self._some())
        )
        if not all(map(math.isfinite, (validation, test, train))):
            got = f"validation {validation}, test {test}, train {train}"
            raise NonFinite(f"the {task.metric_name} is not finite", got=got)
        return {
            "bits": bits,
            "validation": validation,
            "accuracy": test,
            "train": train,
            "gap": task.drop(train, test),
            "bytes": packed_bytes(tensors),
        }

    def _rounded(self, arrays: Arrays, bits: int | None) -> Stored:
        names = self.runner.prunable()
        if bits is None:
            return stored(arrays, shared_weights(arrays, names, ENTRIES))
        quantize, units = quantizer_for(bits=bits, where="sweep"), self.runner.output_units()
        coded = {name: quantize(arrays[name], units=units[name], name=name) for name in names}
        return stored(arrays, coded)

    def _smaller(self, arrays: Arrays, path: Path | None) -> dict[str, Any]:
        """Return the costs of the network without dead units, and write it where it has any."""
        if not self.setting.sparsity:
            return dict.fromkeys(("parameters", "macs", "shapes"))
        found, report = self.runner.shrink(arrays)
        notes = report.get("notes") or {}
        if notes and path is not None:
            facts = {"facts": json.dumps(notes, sort_keys=True)}
            write_bytes(path, tensor_file(found, facts))
        costs = {name: report.get(f"{name}_after") for name in ("parameters", "macs")}
        return {**costs, "shapes": form_of(found) if notes else None}

    def _check_direction(self, arrays: Arrays) -> None:
        if self.task.assumes_goal:
            some = self._some()
            before, after = (
                self.task.judge(self.runner.outputs(given, some.inputs), some.targets)
                for given in (self.runner.fresh(), arrays)
            )
            self.task.check_direction(before, after, "train")

    def _some(self) -> Any:
        train = self.data.train
        return train.take(np.arange(min(len(train), MOST_TRAIN)))


def phase_of(task: Task, setting: Setting) -> Phase:
    """Return the training of a setting."""
    recipe = task.recipe
    return Phase(
        stage="train",
        epochs=setting.epochs,
        learning_rate=recipe.learning_rate if setting.rate is None else setting.rate,
        weight_decay=recipe.weight_decay,
        clip=setting.clip,
        bound=setting.weight_bound,
        sparsity=setting.sparsity or None,
    )


def packed_bytes(tensors: Mapping[str, Any]) -> int:
    """Return the size of the packed file of these tensors.

    >>> arrays = {"w": np.zeros((100, 100), np.float32)}
    >>> packed_bytes(stored(arrays, shared_weights(arrays, ["w"], 16))) < 400
    True
    """
    with tempfile.TemporaryDirectory(prefix="karikomi-") as folder:
        return save(dict(tensors), Path(folder) / "size.karikomi").stat().st_size
