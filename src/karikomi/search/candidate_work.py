"""The evaluation of a candidate: a pure function of its proposal, the seed and the run that it belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from karikomi import pack
from karikomi.errors import Unsupported
from karikomi.files import write_bytes
from karikomi.quantize import Coded
from karikomi.search.candidate_steps import parent_of, stage_of, step_of
from karikomi.search.candidates import Stored, decoded, eight_bits, shared_weights, stored
from karikomi.search.driver import Measured, Proposal
from karikomi.search.folder import Folder
from karikomi.search.lock import read_json
from karikomi.search.run_reference import OpenedRun, RunReference, opened_run
from karikomi.shrink.account import ROUND, why_no_faster
from karikomi.tasks import Arrays, Inputs, LearnedCodes, Phase, Task, Training
from karikomi.tasks.example_scores import example_scores

MASK = "mask/"
SCORES = "scores"
"""The name of the file with one number per example of the validation split."""


def evaluated(proposal: Proposal, seed: int, reference: RunReference) -> Measured:
    """Evaluate a candidate of a run in its own folder, from the last epoch that was done there."""
    run = opened_run(reference)
    work = CandidateWork(run, proposal)
    with Folder(work.path, {"run": reference.run, "proposal": proposal.settings}) as folder:
        work.do(folder)
    facts = {k: v for k, v in work.facts().items() if k != "notes"}
    return Measured(facts, work.path.relative_to(reference.folder).as_posix())


def form_of(arrays: Arrays) -> str:
    """Return a digest of names and shapes: what the time of a dense forward pass depends on."""
    shapes = ((name, [int(size) for size in arrays[name].shape]) for name in sorted(arrays))
    text = "".join(f"{name}{shape}" for name, shape in shapes)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class CandidateWork:
    """One candidate of a run: how it is made, and what was made of it."""

    def __init__(self, run: OpenedRun, proposal: Proposal) -> None:
        self._run, self._task, self._runner = run, run.task, run.runner
        self.proposal, self.stage = proposal, stage_of(proposal)
        self.path = run.reference.folder_of(proposal)

    @property
    def task(self) -> Task:
        """The task of the run."""
        return self._task

    @property
    def file(self) -> Path:
        """The packed file of a candidate that ends in one."""
        return self.path / "stages" / f"{self.stage}.karikomi"

    @property
    def record(self) -> Path:
        """The rows of its training."""
        return self.path / "record.jsonl"

    def facts(self) -> dict[str, Any]:
        """Return the facts of a candidate that is done."""
        state = read_json(self.path / "state.json") or {"done": {}}
        return dict(state["done"][self.stage])

    def arrays(self) -> Arrays:
        """Return the arrays of a candidate that is done, without its masks."""
        return {n: a for n, a in self._read(self.stage).items() if not n.startswith(MASK)}

    def masks(self) -> Arrays:
        """Return name -> kept entries of what was pruned."""
        both = self._read(self.stage)
        return {name[len(MASK) :]: a for name, a in both.items() if name.startswith(MASK)}

    def scores(self) -> np.ndarray | None:
        """Return one number per example of the validation split, or None where the metric has none."""
        found = self._read(SCORES).get(SCORES)
        return None if found is None or not found.size else found

    def outputs(self, arrays: Arrays, inputs: Inputs) -> np.ndarray:
        """Return the outputs of the candidate, in the engine that it is made for."""
        if step_of(self.proposal) == "int8":
            return self._runner.integer_outputs(pack.load_coded(self.file), inputs)
        return self._runner.outputs(arrays, inputs)

    def timed(self, dense: Arrays) -> dict[str, float]:
        """Return the milliseconds of the candidate, measured now in the engine that it is made for."""
        if step_of(self.proposal) == "int8":
            return self._runner.integer_milliseconds(pack.load_coded(self.file), dense)
        return {"ms": self._runner.milliseconds(self.arrays())}

    def parent(self) -> CandidateWork:
        """Return the candidate that it continues."""
        proposal = parent_of(self.proposal)
        assert proposal is not None  # noqa: S101  (only the dense network has none, and continues nothing)
        return CandidateWork(self._run, proposal)

    def ancestor(self, step: str) -> CandidateWork | None:
        """Return the nearest candidate, this one included, whose last step is `step`."""
        work = self
        while step_of(work.proposal) != step:
            if step_of(work.proposal) == "dense":
                return None
            work = work.parent()
        return work

    def adopt(self) -> dict[str, str]:
        """Give the runner the notes of the shrunk network that the arrays are of, and return them."""
        # Those of a shrink include what the width before it removed.
        for step in ("shrink", "width"):
            found = self.ancestor(step)
            notes = {} if found is None else found.facts().get("notes") or {}
            if notes:
                self._runner.adopt(notes)
                return notes
        return {}

    def do(self, folder: Folder) -> None:
        """Make the candidate, or count what an earlier process did."""
        if folder.done(self.stage) is not None:
            self._run.on_epoch(self.stage, self.epochs())
            return
        step = step_of(self.proposal)
        if step != "dense":
            self.parent().adopt()
        make: Mapping[str, Callable[[Folder], None]] = {
            "dense": self._dense,
            "width": self._width,
            "recover": self._recover,
            "prune": self._prune,
            "shrink": self._shrink,
            "entries": self._entries,
            "codebook": self._codebook,
            "bits": self._bits,
            "rate": self._rate,
            "learned": self._learned,
            "store": self._floats,
            "int8": self._integers,
        }
        make[step](folder)

    def epochs(self) -> int:
        """Return the epochs of training that this candidate takes beside its parent."""
        recipe, given = self._task.recipe, self._run.reference.weights is not None
        settings = self.proposal.settings
        of = {
            "dense": 0 if given else recipe.train_epochs,
            "recover": (settings.get("recover") or [0])[-1],
            "prune": recipe.prune_epochs,
            "entries": recipe.tune_epochs,
            "learned": settings.get("epochs", 0),
        }
        return int(of.get(step_of(self.proposal), 0))

    def _dense(self, folder: Folder) -> None:
        recipe, given = self._task.recipe, self._run.reference.weights
        fresh = self._runner.fresh()
        if given is not None:
            arrays = self._run.weights or safetensors.numpy.load_file(given)
            facts = {"untrained": None, "validation": self._validation(folder, arrays)}
            folder.finish(self.stage, facts, dict(arrays))
            return
        untrained = self._validation(folder, fresh)
        phase = Phase(
            stage=self.stage,
            epochs=recipe.train_epochs,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            clip=recipe.clip,
        )
        arrays = self._train(folder, fresh, phase).arrays()
        facts = {"untrained": untrained, "validation": self._validation(folder, arrays)}
        folder.finish(self.stage, facts, arrays)

    def _width(self, folder: Folder) -> None:
        """Keep the units of the highest score, and re-fit what is left by least squares."""
        arrays, report = self._runner.shrink(
            self.parent().arrays(), width=self.proposal.settings["width"]
        )
        if not report.get("notes") or not report.get("removed"):
            alone = report.get("left_alone") or {}
            raise Unsupported(
                "no units of the network can be removed",
                where=self.stage,
                got="; ".join(f"{name}: {why}" for name, why in alone.items())
                or f"all units of each layer are left, in multiples of {ROUND}",
            )
        self._runner.adopt(report["notes"])
        facts = {**report, "validation": self._validation(folder, arrays)}
        folder.finish(self.stage, facts, arrays)

    def _recover(self, folder: Folder) -> None:
        """Train what is left with the dense network's outputs; a later stretch goes on from a shorter one."""
        recipe = self._task.recipe
        phase = Phase(
            stage=self.stage,
            epochs=self.epochs(),
            learning_rate=recipe.learning_rate,
            clip=recipe.clip,
            teacher=self._teacher(),
        )
        arrays = self._train(folder, self.parent().arrays(), phase).arrays()
        folder.finish(self.stage, {"validation": self._validation(folder, arrays)}, arrays)

    def _prune(self, folder: Folder) -> None:
        below, recipe = self.parent(), self._task.recipe
        ladder = self.proposal.settings["prune"]
        phase = Phase(
            stage=self.stage,
            epochs=recipe.prune_epochs,
            learning_rate=recipe.learning_rate,
            clip=recipe.clip,
            sparsity=ladder[-1],
            initial=ladder[-2] if len(ladder) > 1 else 0.0,
            masks=below.masks(),
            teacher=self._teacher(),
        )
        training = self._train(folder, below.arrays(), phase)
        masks = {f"{MASK}{name}": mask for name, mask in training.masks().items()}
        facts = {"validation": self._validation(folder, training.arrays())}
        folder.finish(self.stage, facts, {**training.arrays(), **masks})

    def _shrink(self, folder: Folder) -> None:
        """Remove the units that the masks made dead; exact, so there is nothing to decide."""
        arrays, report = self._runner.shrink(self.parent().arrays())
        folder.finish(self.stage, report, arrays)

    def _entries(self, folder: Folder) -> None:
        """Share weights among so many centroids per tensor, and tune the centroids."""
        recipe, arrays = self._task.recipe, self.parent().arrays()
        names = [name for name in self._runner.prunable() if np.any(arrays[name])]
        phase = Phase(
            stage=self.stage,
            epochs=recipe.tune_epochs,
            learning_rate=recipe.learning_rate / 10,
            clip=recipe.clip,
            teacher=self._teacher(),
            coded=shared_weights(arrays, names, self.proposal.settings["entries"]),
        )
        training = self._train(folder, arrays, phase)
        tuned = training.arrays()
        coded = {**training.coded(), **self._rounded(tuned, [])}
        self._pack(folder, self._with_rest(tuned, coded))

    def _codebook(self, folder: Folder) -> None:
        """Share weights among so many centroids per tensor, as they are found; every tensor, as `pack` does."""
        entries = self.proposal.settings["codebook"]
        self._pack(folder, *self._runner.quantized(self.parent().arrays(), entries=entries))

    def _rate(self, folder: Folder) -> None:
        """Round every tensor to a mean number of bits of an entropy coder, without training."""
        settings = self.proposal.settings
        how = {"rate": settings["rate"], "method": settings["method"]}
        self._pack(folder, *self._runner.quantized(self.parent().arrays(), **how))

    def _learned(self, folder: Folder) -> None:
        """Train with rounded parameters and a penalty on their bits."""
        recipe, arrays, settings = self._task.recipe, self.parent().arrays(), self.proposal.settings
        # Bits per weight of the dense network, so that widths of the same goal are of the same size.
        weights = sum(a.size for a in self._teacher().values() if a.dtype.kind == "f")
        phase = Phase(
            stage=self.stage,
            epochs=self.epochs(),
            learning_rate=recipe.learned_rate,
            clip=recipe.clip,
            teacher=self._teacher(),
            learned=LearnedCodes(
                goal=settings["learned"] * weights,
                width=recipe.learned_bits,
                step_rate=3 * recipe.learned_rate,
            ),
        )
        training = self._train(folder, arrays, phase)
        self._pack(folder, self._with_rest(training.arrays(), training.coded()))

    def _integers(self, folder: Folder) -> None:
        """Run the file of the parent with integer activations too: its file, and the metric of that engine."""
        parent = self.parent()
        write_bytes(self.file, parent.file.read_bytes())
        facts = {k: v for k, v in parent.facts().items() if k != "validation"}
        arrays = parent.arrays()
        facts["validation"] = self._validation(folder, arrays)
        facts["shapes"] = f"{facts['shapes']}-int8"
        folder.finish(self.stage, facts, arrays)

    def _bits(self, folder: Folder) -> None:
        """Round to per-channel 8-bit grids, without training."""
        arrays = self.parent().arrays()
        coded = self._rounded(arrays, self._runner.prunable())
        self._pack(folder, self._with_rest(arrays, coded))

    def _floats(self, folder: Folder) -> None:
        """Quantize nothing: lossless."""
        self._pack(folder, stored(self.parent().arrays(), {}))

    def _pack(
        self, folder: Folder, tensors: Stored, left_alone: Mapping[str, str] | None = None
    ) -> None:
        notes = {"task": self._task.name, **(self.parent().adopt() or self._runner.notes())}
        file = pack.save(tensors, self.file, notes=notes)
        arrays = decoded(tensors)
        costs = self.costs()
        facts = {
            "validation": self._validation(folder, arrays),
            "bytes": file.stat().st_size,
            "parameters": costs.get("parameters_after"),
            "macs": costs.get("macs_after"),
            "shapes": form_of(arrays),
            **({"as_it_is": dict(left_alone)} if left_alone else {}),
        }
        folder.finish(self.stage, facts, arrays)

    def costs(self) -> dict[str, Any]:
        """Return what the shrinks of a candidate changed: costs before the first and after the last, and the report."""
        reports = [found.facts() for s in ("width", "shrink") if (found := self.ancestor(s))]
        merged = dict(reports[-1]) if reports else {}
        for name, value in reports[0].items() if len(reports) > 1 else ():
            if name.endswith("_before"):
                merged[name] = value
            if name == "removed":
                merged[name] = value + merged.get("removed", 0)
        if len(reports) > 1:
            # The last shrink alone may have found nothing left to remove.
            merged["reason"] = why_no_faster(
                merged.get("removed", 0),
                merged.get("macs_before", 0),
                merged.get("macs_after", 0),
                merged.get("frozen") or {},
                widths=merged.get("widths_before"),
            )
        return merged

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

    def _with_rest(self, arrays: Arrays, coded: Mapping[str, Coded]) -> Stored:
        """Return the tensors of a file: the codes, and grids for the rest, such as norms and their statistics."""
        rest = [n for n, a in arrays.items() if n not in coded and a.dtype.kind == "f" and a.size]
        tensors = stored(arrays, coded)
        if not rest:
            return tensors
        try:
            others, _ = self._runner.quantized(arrays, only=rest, bits=8)
        except Unsupported:
            return tensors  # none of them has a grid: they stay as they are
        return tensors | {name: others[name] for name in rest}

    def _teacher(self) -> Arrays:
        dense = self.ancestor("dense")
        assert dense is not None  # noqa: S101  (every candidate begins with the dense network)
        return dense.arrays()

    def _train(self, folder: Folder, arrays: Arrays, phase: Phase) -> Training:
        training = self._runner.train(arrays, phase)
        return folder.train(phase.stage, training, phase, self._run.on_epoch)

    def _validation(self, folder: Folder, arrays: Arrays) -> float:
        """Return the metric on the validation split, after writing that of each example."""
        split = self._run.data.validation
        outputs = self.outputs(arrays, split.inputs)
        value = self._task.judge(outputs, split.targets)
        scores = example_scores(self._task, outputs, split.targets)
        folder.write_arrays(
            SCORES, {SCORES: np.empty(0) if scores is None else scores}, durable=False
        )
        return value

    def _read(self, name: str) -> Arrays:
        return Folder.stored(self.path / "stages" / f"{name}.safetensors")[0]
