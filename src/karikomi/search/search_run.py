"""One run of the search in its folder: what identifies it, and its rounds of candidates."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from karikomi import __version__
from karikomi.errors import Unsupported
from karikomi.files import tensor_file, write_bytes
from karikomi.search.candidate_steps import step_of
from karikomi.search.candidate_work import CandidateWork, evaluated
from karikomi.search.driver import (
    Budgets,
    Finished,
    LatencyTable,
    Proposal,
    RunJournal,
    drive,
    opened,
    source_digest,
)
from karikomi.search.ladder import Ladder, raise_failure
from karikomi.search.run_reference import OpenedRun, RunReference, TaskSource, keep_opened
from karikomi.search.search_outcome import SearchOutcome, outcome_of
from karikomi.tasks import Arrays, Data, Runner, Task

FORMAT = 3
"""The form of a run folder."""

MAY_FAIL = ("width", "rate", "codebook", "learned", "int8")
"""Steps that not every network can take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What `compress` was asked for."""

    task: Task
    source: TaskSource
    content: Data
    budgets: Budgets
    preset: str | None = None
    weights: Arrays | None = None
    trains: bool = True
    seed: int = 0
    workers: int = 1
    scheduler: str | None = None
    take: int | None = None
    forms: tuple[str, ...] = ()
    progress: bool = False
    integers: bool = False
    reuse: Path | None = None

    @property
    def inline(self) -> bool:
        """Whether candidates are evaluated in this process."""
        return self.workers == 1 and self.scheduler is None


def identity_of(request: SearchRequest, runner: Runner) -> dict[str, Any]:
    """Return what a run folder is of: another identity in it is refused."""
    task, budgets = request.task, request.budgets
    return {
        "format": FORMAT,
        "karikomi": __version__,
        "task": task.name,
        "data": request.content.fingerprint(),
        "code": task.fingerprint(),
        "network": runner.fingerprint(),
        "goal": task.direction,
        "classes": [task.class_axis, task.ignore_index],
        "output": task.output,
        "recipe": task.recipe.as_dict(),
        "seed": request.seed,
        "weights": None if request.weights is None else digest_of(request.weights),
        "trains": request.trains,
        "max_drop": budgets.max_drop,
        **{f"max_{name}": limit for name, limit in budgets.limits.items() if name != "drop"},
        "objective": budgets.objective_name,
        "integers": request.integers,
    }


def digest_of(arrays: Mapping[str, np.ndarray]) -> str:
    """Return a digest of named arrays."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}\0{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


class SearchRun:
    """The search of a request in a run folder, from what is there to its end."""

    def __init__(self, request: SearchRequest, runner: Runner, folder: Path, run: str) -> None:
        self.request, self.runner, self.folder = request, runner, folder
        self.weights = None if request.weights is None else folder / "given.safetensors"
        reference = RunReference(
            folder=str(folder.absolute()),
            run=run,
            source=request.source,
            seed=request.seed,
            weights=None if self.weights is None else str(self.weights.absolute()),
        )
        self.opened = OpenedRun(reference, request.task, request.content, runner)
        self.opened.weights = request.weights
        self.latency = LatencyTable(
            folder / "latency.json", runner.environment(), lambda form: self._timed(form)
        )
        self._forms: dict[str, CandidateWork] = {}
        self._dense: float | None = None
        self.ladder = self._ladder()

    def finished(
        self, *, on_finished: Any, on_epoch: Any = lambda stage, epochs: None
    ) -> dict[Proposal, Finished]:
        """Return all candidates of the search, evaluating those that the folder lacks."""
        request, reference = self.request, self.opened.reference
        self.opened.on_epoch = on_epoch
        if self.weights is not None and request.weights is not None and not self.weights.exists():
            write_bytes(self.weights, tensor_file(request.weights))
        keep_opened(self.opened)
        if not request.inline:
            reference.check_for_workers()
        identity = {"run": reference.run, "source": source_digest(), "version": __version__}
        with (
            RunJournal(self.folder / "journal.jsonl", identity) as journal,
            opened(request.workers, request.scheduler) as executor,
        ):
            for note in journal.notes:
                say(note)
            return drive(
                self.ladder,
                evaluated,
                journal=journal,
                executor=executor,
                seed=request.seed,
                reference=reference,
                on_finished=on_finished,
                after_round=self._after_round,
            )

    def work(self, proposal: Proposal) -> CandidateWork:
        """Return a candidate's place."""
        return CandidateWork(self.opened, proposal)

    def _ladder(self) -> Ladder:
        request = self.request
        return Ladder(
            origin="trained" if request.weights is None else "given",
            recipe=request.task.recipe,
            prunes=bool(self.runner.prunable()),
            trains=request.trains,
            integers=request.integers,
            budgets=request.budgets,
            drop=request.task.drop,
            # Against the rounding of a difference of two shares: far less than half an example.
            slack=0.5e-6 / len(request.content.validation),
            facts_of=self.facts_of,
        )

    def facts_of(self, found: Finished) -> dict[str, Any]:
        """Return the facts of a file with its drop, and its milliseconds where a budget or the objective needs them."""
        facts = dict(found.facts)
        if self._dense is None or facts.get("validation") is None:
            return facts
        facts["drop"] = self.request.task.drop(self._dense, facts["validation"])
        if self._times and "shapes" in facts:
            facts |= self.latency.row(facts["shapes"])
        return facts

    @property
    def _times(self) -> bool:
        budgets = self.request.budgets
        return "ms" in (*budgets.limits, budgets.objective_name)

    def _after_round(self, found: Sequence[Finished]) -> None:
        """Measure what is new while nothing else is evaluated."""
        for item in found:
            if item.error is None and step_of(item.proposal) == "dense":
                trained, untrained = item.facts["validation"], item.facts.get("untrained")
                if untrained is not None:
                    self.request.task.check_direction(untrained, trained, "validation")
                self._dense = trained
            if item.error is None and self._times and "shapes" in item.facts:
                work = self.work(item.proposal)
                work.adopt()
                self._forms[item.facts["shapes"]] = work
                self.latency.row(item.facts["shapes"])
                self._forms.clear()

    def _timed(self, form: str) -> dict[str, float]:
        if form not in self._forms:
            raise Unsupported(
                "this form is not in the latency table", where=str(self.folder), got=form
            )
        return self._forms[form].timed(self.work(self.ladder.dense).arrays())


def searched(request: SearchRequest, runner: Runner, folder: Path) -> SearchOutcome:
    """Run a search in which failures are raised, and return its outcome."""

    def on_finished(found: Finished, again: bool) -> None:
        # Where units cannot be removed, or an engine is missing, the search goes on without.
        if found.error is not None and step_of(found.proposal) not in MAY_FAIL:
            raise_failure(found)

    run = SearchRun(request, runner, folder, "rehearsal")
    return outcome_of(run.opened, run.ladder, run.finished(on_finished=on_finished))


def say(text: str) -> None:
    """Write a line to stderr, above the progress bar."""
    tqdm.write(f"karikomi: {text}", file=sys.stderr)


def epochs_of(request: SearchRequest) -> int:
    """Return the most epochs that a search of a task by the ladder takes."""
    recipe, given = request.task.recipe, request.weights is not None
    epochs = 0 if given else recipe.train_epochs
    if request.trains:
        steps = len(recipe.sparsities) + len(recipe.widths)
        tuned = len(recipe.entries) if recipe.sparsities else 0
        epochs += steps * recipe.prune_epochs + tuned * recipe.tune_epochs
        epochs += len(recipe.learned) * recipe.learned_epochs
    return epochs
