"""The stages of a compression, each done once, kept on disk, and read back when the run resumes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from karikomi import pack
from karikomi.quantize import Coded
from karikomi.search.candidates import Stored, decoded, eight_bits, shared_weights, stored
from karikomi.search.folder import Folder, OnEpoch
from karikomi.tasks import Arrays, Data, Phase, Runner, Task, Training

_MASK = "mask/"


@dataclass(frozen=True, slots=True)
class Rung:
    """A network on the ladder of sparsities: its arrays, its masks, its metric on the validation split."""

    stage: str
    sparsity: float
    arrays: Arrays
    masks: Arrays
    validation: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A quantized network in a packed file."""

    stage: str
    what: str
    arrays: Arrays
    path: Path
    size: int
    validation: float
    passed: bool


class Stages:
    """All stages of one run; a stage that an earlier run finished is read, not repeated."""

    def __init__(
        self,
        task: Task,
        data: Data,
        runner: Runner,
        folder: Folder,
        max_drop: float,
        on_epoch: OnEpoch,
    ) -> None:
        self._task, self._data, self._runner = task, data, runner
        self._folder, self._max_drop, self._on_epoch = folder, max_drop, on_epoch
        self._notes: dict[str, str] = {}

    def untrained(self) -> float:
        """Return the validation metric of the untrained network."""
        if (facts := self._folder.done("untrained")) is None:
            facts = {"validation": self._validation(self._runner.fresh())}
            self._folder.finish("untrained", facts)
        return facts["validation"]

    def dense(self) -> Rung:
        """Train the dense network; a metric of unknown goal that training lowered is refused."""
        recipe, stage = self._task.recipe, "train"
        untrained = self.untrained()
        if (facts := self._folder.done(stage)) is None:
            phase = Phase(
                stage=stage,
                epochs=recipe.train_epochs,
                learning_rate=recipe.learning_rate,
                weight_decay=recipe.weight_decay,
                clip=recipe.clip,
            )
            arrays = self._train(self._runner.fresh(), phase).arrays()
            facts = {"validation": self._validation(arrays)}
            self._folder.finish(stage, facts, arrays)
        else:
            self._on_epoch(stage, recipe.train_epochs)
        arrays, _ = self._folder.read_arrays(stage)
        self._task.check_direction(untrained, facts["validation"], "validation")
        return Rung(stage, 0.0, arrays, {}, facts["validation"], True)

    def rungs(self, dense: Rung) -> Iterator[Rung]:
        """Prune to each sparsity of the ladder, each from the one before, until the validation metric drops too far.

        Empty for a network without a weight that can be pruned.
        """
        if not self._runner.prunable():
            return
        below = dense
        for sparsity in self._task.recipe.sparsities:
            below = self._rung(sparsity, below, dense)
            yield below
            if not below.passed:
                return

    def shrunk(self, rung: Rung) -> tuple[Arrays, dict[str, Any]]:
        """Remove the units that the masks made dead; exact, so there is nothing to decide."""
        stage = f"shrink-{rung.sparsity!r}"
        if (facts := self._folder.done(stage)) is None:
            arrays, facts = self._runner.shrink(rung.arrays)
            self._folder.finish(stage, facts, arrays)
        # The candidates that follow are of this network.
        self._notes = facts.get("notes", {})
        if self._notes:
            self._runner.adopt(self._notes)
        return self._folder.read_arrays(stage)[0], facts

    def shared(self, rung: Rung, arrays: Arrays, entries: int, dense: Rung) -> Candidate:
        """Share weights among `entries` centroids per tensor, tune the centroids, pack."""
        recipe = self._task.recipe
        stage = f"quantize-{rung.sparsity!r}-{entries}"
        if self._folder.done(stage) is None:
            names = [name for name in self._runner.prunable() if np.any(arrays[name])]
            phase = Phase(
                stage=stage,
                epochs=recipe.tune_epochs,
                learning_rate=recipe.learning_rate / 10,
                clip=recipe.clip,
                teacher=dense.arrays,
                coded=shared_weights(arrays, names, entries),
            )
            training = self._train(arrays, phase)
            tuned = training.arrays()
            coded = {**training.coded(), **self._rounded(tuned, [])}
            self._finish_candidate(stage, stored(tuned, coded), dense)
        else:
            self._on_epoch(stage, recipe.tune_epochs)
        return self._candidate(stage, f"{entries} shared weights per tensor")

    def eight_bits(self, rung: Rung, arrays: Arrays, dense: Rung) -> Candidate:
        """Round to per-channel 8-bit grids, without training, and pack."""
        stage = f"quantize-{rung.sparsity!r}-int8"
        if self._folder.done(stage) is None:
            coded = self._rounded(arrays, self._runner.prunable())
            self._finish_candidate(stage, stored(arrays, coded), dense)
        return self._candidate(stage, "8 bits per channel")

    def floats(self, rung: Rung, arrays: Arrays, dense: Rung) -> Candidate:
        """Pack without quantization: lossless, so it passes where the rung passed."""
        stage = f"quantize-{rung.sparsity!r}-none"
        if self._folder.done(stage) is None:
            self._finish_candidate(stage, stored(arrays, {}), dense)
        return self._candidate(stage, "no quantization")

    def _rung(self, sparsity: float, below: Rung, dense: Rung) -> Rung:
        recipe, stage = self._task.recipe, f"prune-{sparsity!r}"
        if (facts := self._folder.done(stage)) is None:
            phase = Phase(
                stage=stage,
                epochs=recipe.prune_epochs,
                learning_rate=recipe.learning_rate,
                clip=recipe.clip,
                sparsity=sparsity,
                initial=below.sparsity,
                masks=below.masks,
                teacher=dense.arrays,
            )
            training = self._train(below.arrays, phase)
            validation = self._validation(training.arrays())
            facts = {"validation": validation, "passed": self._holds(validation, dense)}
            masks = {f"{_MASK}{name}": mask for name, mask in training.masks().items()}
            self._folder.finish(stage, facts, {**training.arrays(), **masks})
        else:
            self._on_epoch(stage, recipe.prune_epochs)
        both, _ = self._folder.read_arrays(stage)
        masks = {name[len(_MASK) :]: a for name, a in both.items() if name.startswith(_MASK)}
        arrays = {name: a for name, a in both.items() if not name.startswith(_MASK)}
        return Rung(stage, sparsity, arrays, masks, facts["validation"], facts["passed"])

    def _rounded(self, arrays: Arrays, pruned: list[str]) -> dict[str, Coded]:
        """Return 8-bit grids of `pruned`, of the biases, and of the weights that pruning leaves alone.

        A parameter with several names (tied weights) has one grid.
        """
        runner = self._runner
        alone = [
            n for n in runner.left_alone() if arrays[n].dtype.kind == "f" and arrays[n].ndim > 1
        ]
        names = [name for name in (*pruned, *runner.biases(), *alone) if np.any(arrays[name])]
        coded = eight_bits(arrays, names, runner.output_units())
        tied = {name: coded[first] for name, first in runner.tied().items() if first in coded}
        return {**coded, **tied}

    def _train(self, arrays: Arrays, phase: Phase) -> Training:
        training = self._runner.train(arrays, phase)
        return self._folder.train(phase.stage, training, phase, self._on_epoch)

    def _finish_candidate(self, stage: str, tensors: Stored, dense: Rung) -> None:
        notes = {"task": self._task.name, **self._notes}
        path = pack.save(tensors, self._folder.stages / f"{stage}.karikomi", notes=notes)
        arrays = decoded(tensors)
        validation = self._validation(arrays)
        facts = {
            "validation": validation,
            "passed": self._holds(validation, dense),
            "bytes": path.stat().st_size,
        }
        self._folder.finish(stage, facts, arrays)

    def _candidate(self, stage: str, what: str) -> Candidate:
        facts = self._folder.done(stage)
        assert facts is not None  # noqa: S101  (the caller has just finished it)
        arrays, _ = self._folder.read_arrays(stage)
        path = self._folder.stages / f"{stage}.karikomi"
        return Candidate(
            stage, what, arrays, path, facts["bytes"], facts["validation"], facts["passed"]
        )

    def _validation(self, arrays: Arrays) -> float:
        split = self._data.validation
        return self._task.judge(self._runner.outputs(arrays, split.inputs), split.targets)

    def _holds(self, validation: float, dense: Rung) -> bool:
        # Half an example of slack against the rounding of a difference of two shares.
        slack = 0.5 / len(self._data.validation)
        drop = self._task.drop(dense.validation, validation)
        return bool(drop <= self._max_drop + slack * 1e-6)
