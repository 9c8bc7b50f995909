"""The evaluation of a candidate: a pure function of its proposal, the seed and the run that it belongs to.

The settings of a proposal are steps, each of which continues what its parent left: ``dense``, ``width``,
``prune`` (a ladder of sparsities), ``shrink``, and one of ``entries``, ``codebook`` (entries that are not tuned),
``bits`` and ``store``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from karikomi import pack
from karikomi.errors import Unsupported
from karikomi.quantize import Coded
from karikomi.search.candidates import Stored, decoded, eight_bits, shared_weights, stored
from karikomi.search.driver import Measured, Proposal
from karikomi.search.folder import Folder
from karikomi.search.lock import read_json
from karikomi.search.run_reference import OpenedRun, RunReference, opened_run
from karikomi.tasks import Arrays, Phase, Task, Training
from karikomi.tasks.example_scores import example_scores

MASK = "mask/"
LAST_STEPS = ("entries", "codebook", "bits", "store")
"""The steps that end in a packed file."""

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


def parent_of(proposal: Proposal) -> Proposal | None:
    """Return the proposal that a candidate continues, or None for the dense network.

    >>> step = Proposal.of(dense="trained", prune=[0.8, 0.9], shrink="dead")
    >>> parent_of(step).text, parent_of(parent_of(step)).text
    ('{"dense":"trained","prune":[0.8,0.9]}', '{"dense":"trained","prune":[0.8]}')
    """
    settings = proposal.settings
    step = step_of(proposal)
    if step == "dense":
        return None
    if step == "prune" and len(settings["prune"]) > 1:
        return Proposal.of(**{**settings, "prune": settings["prune"][:-1]})
    return Proposal.of(**{name: value for name, value in settings.items() if name != step})


def step_of(proposal: Proposal) -> str:
    """Return the last step of a proposal."""
    order = (*LAST_STEPS, "shrink", "prune", "width", "dense")
    return next(name for name in order if name in proposal.settings)


def stage_of(proposal: Proposal) -> str:
    """Return the name of a candidate in the rows of the record, and of its files.

    >>> stage_of(Proposal.of(dense="trained", prune=[0.8, 0.9], shrink="dead", entries=16))
    'quantize-0.9-16'
    """
    settings, step = proposal.settings, step_of(proposal)
    wide = f"width-{settings['width']!r}" if "width" in settings else ""
    sparsity = (settings.get("prune") or [0.0])[-1]
    ends = {
        "entries": settings.get("entries"),
        "codebook": f"{settings.get('codebook')}-untuned",
        "bits": "int8",
        "store": "none",
    }
    name = {
        "dense": "train",
        "width": wide,
        "prune": f"prune-{sparsity!r}",
        "shrink": f"shrink-{sparsity!r}",
    }.get(step, f"quantize-{sparsity!r}-{ends.get(step)}")
    return f"{wide}-{name}" if wide and step != "width" else name


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
            "prune": self._prune,
            "shrink": self._shrink,
            "entries": self._entries,
            "codebook": self._codebook,
            "bits": self._bits,
            "store": self._floats,
        }
        make[step](folder)

    def epochs(self) -> int:
        """Return the epochs of training that this candidate takes beside its parent."""
        recipe, given = self._task.recipe, self._run.reference.weights is not None
        trained = 0 if given else recipe.train_epochs
        of = {"dense": trained, "width": recipe.prune_epochs, "prune": recipe.prune_epochs}
        return {**of, "entries": recipe.tune_epochs}.get(step_of(self.proposal), 0)

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
        """Keep the units of the highest score, and recover by training with the dense network's outputs."""
        dense, recipe = self.parent().arrays(), self._task.recipe
        width = self.proposal.settings["width"]
        # Not again where the recovery was stopped: the times in the report would be others.
        if (report := folder.done("cut")) is None:
            arrays, report = self._runner.shrink(dense, width=width)
            folder.finish("cut", report, arrays)
        arrays = folder.read_arrays("cut")[0]
        if not report.get("notes"):
            raise Unsupported(
                "no units of the network can be removed",
                where=self.stage,
                got="; ".join(f"{k}: {v}" for k, v in (report.get("left_alone") or {}).items()),
            )
        self._runner.adopt(report["notes"])
        phase = Phase(
            stage=self.stage,
            epochs=recipe.prune_epochs,
            learning_rate=recipe.learning_rate,
            clip=recipe.clip,
            teacher=dense,
        )
        arrays = self._train(folder, arrays, phase).arrays()
        facts = {**report, "validation": self._validation(folder, arrays)}
        folder.finish(self.stage, facts, arrays)

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
        self._pack(folder, stored(tuned, coded))

    def _codebook(self, folder: Folder) -> None:
        """Share weights among so many centroids per tensor, as they are found."""
        arrays, entries = self.parent().arrays(), self.proposal.settings["codebook"]
        names = [name for name in self._runner.prunable() if np.any(arrays[name])]
        coded = {**shared_weights(arrays, names, entries), **self._rounded(arrays, [])}
        self._pack(folder, stored(arrays, coded))

    def _bits(self, folder: Folder) -> None:
        """Round to per-channel 8-bit grids, without training."""
        arrays = self.parent().arrays()
        self._pack(folder, stored(arrays, self._rounded(arrays, self._runner.prunable())))

    def _floats(self, folder: Folder) -> None:
        """Quantize nothing: lossless."""
        self._pack(folder, stored(self.parent().arrays(), {}))

    def _pack(self, folder: Folder, tensors: Stored) -> None:
        notes = {"task": self._task.name, **self.parent().adopt()}
        file = pack.save(tensors, self.file, notes=notes)
        arrays = decoded(tensors)
        costs = self.costs()
        facts = {
            "validation": self._validation(folder, arrays),
            "bytes": file.stat().st_size,
            "parameters": costs.get("parameters_after"),
            "macs": costs.get("macs_after"),
            "shapes": form_of(arrays),
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
        outputs = self._runner.outputs(arrays, split.inputs)
        value = self._task.judge(outputs, split.targets)
        scores = example_scores(self._task, outputs, split.targets)
        folder.write_arrays(
            SCORES, {SCORES: np.empty(0) if scores is None else scores}, durable=False
        )
        return value

    def _read(self, name: str) -> Arrays:
        return Folder.stored(self.path / "stages" / f"{name}.safetensors")[0]
