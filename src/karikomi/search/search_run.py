"""One run of the search in its folder: what identifies it, its rounds, its certificate, and what it publishes."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tqdm import tqdm

from karikomi import __version__
from karikomi.errors import BadFile, KarikomiError, Unsupported, check
from karikomi.files import write_bytes, write_json
from karikomi.search.candidate_steps import step_of
from karikomi.search.candidate_work import CandidateWork, evaluated
from karikomi.search.certifying import certified, stated_beforehand
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
from karikomi.search.folder import Folder
from karikomi.search.ladder import Ladder, raise_failure
from karikomi.search.lock import AFRESH
from karikomi.search.result import clip_summary, describe
from karikomi.search.run_reference import OpenedRun, RunReference, TaskSource, keep_opened
from karikomi.search.search_outcome import Candidate, SearchOutcome, outcome_of
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
    progress: bool = False
    integers: bool = False

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
            write_bytes(self.weights, safetensors.numpy.save(request.weights))
        keep_opened(self.opened)
        if not request.inline:
            reference.check_for_workers()
        identity = {"run": reference.run, "source": source_digest(), "version": __version__}
        with (
            RunJournal(self.folder / "journal.jsonl", identity) as journal,
            opened(request.workers, request.scheduler) as executor,
        ):
            for note in journal.notes:
                _say(note)
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


def completed(request: SearchRequest, runner: Runner, folder: Folder) -> dict[str, Any]:
    """Search in an opened run folder, certify, publish, and return the result."""
    task, budgets = request.task, request.budgets
    environment = _remembered(folder, request, runner)
    before = stated_beforehand(task, request.content, budgets.max_drop)
    if before is not None and before.verdict != "can" and request.progress and not folder.resumed:
        _say(before.sentence())
    identity = json.dumps(identity_of(request, runner), sort_keys=True)
    run = SearchRun(
        request, runner, folder.path, hashlib.sha256(identity.encode()).hexdigest()[:16]
    )
    found = _followed(run)
    outcome = outcome_of(run.opened, run.ladder, found)
    certificate, held = certified(
        run.opened, outcome, budgets, folder.path / "spent.json", before=before
    )
    front = outcome.front(budgets)
    if request.take is not None:
        outcome = outcome.with_chosen(_taken(front, request.take))
    elif held is not None:
        outcome = outcome.with_chosen(held)
    rows = _merged_record(run, found, folder.path / "record.jsonl")
    result = {
        **describe(
            task, request.content, runner, outcome, max_drop=budgets.max_drop, seed=request.seed
        ),
        "file": str(folder.path / "model.karikomi"),
        "dense": str(folder.path / "dense.safetensors"),
        "record": str(rows),
        "clip": clip_summary(task, rows),
        "seconds": round(sum(item.seconds for item in found.values()), 1),
        "resumed": folder.resumed,
        "environment": environment,
        "preset": request.preset,
        "training": request.trains,
        "budgets": {f"max_{name}": limit for name, limit in budgets.limits.items()},
        "objective": budgets.objective_name,
        "binding": outcome.judgement.binding,
        "nearest_budgets": outcome.judgement.nearest,
        "certificate": certificate,
        "verdict": _verdict(outcome, certificate, taken=request.take is not None),
        "front": [_point(number, item, outcome, folder.path) for number, item in enumerate(front)],
        "taken": request.take,
    }
    result["warnings"] += _warnings(request, runner, outcome, run.latency.notes)
    if shared := certificate.get("also_in_validation"):
        result["warnings"].append(
            f"{shared} of the {certificate['n']} certify examples are in the validation split too,"
            " on which the choices were made"
        )
    _publish(result, outcome, folder.path)
    return result


def _followed(run: SearchRun) -> dict[Proposal, Finished]:
    request = run.request
    with _bar(request) as bar:

        def on_epoch(stage: str, epochs: int) -> None:
            bar.set_postfix_str(stage, refresh=False)
            bar.update(epochs)

        def on_finished(found: Finished, again: bool) -> None:
            work = run.work(found.proposal)
            if found.error is not None:
                _say(f"{work.stage} failed: {found.error['kind']}: {found.error['text']}")
            elif again or not request.inline:
                on_epoch(work.stage, work.epochs())

        return run.finished(on_finished=on_finished, on_epoch=on_epoch)


def _verdict(outcome: SearchOutcome, certificate: Mapping[str, Any], *, taken: bool) -> str:
    """Return ``"missed"`` beyond a budget, ``"held"`` where it is certified or none is asked for, else ``"undecided"``.

    A certificate that so many examples cannot give was not run, which is no proof either.
    """
    met = outcome.chosen.passed if taken else outcome.judgement.held
    if not met:
        return "missed"
    if certificate["status"] == "not run":
        return "held" if certificate.get("asked") is False else "undecided"
    if taken:
        # Of a sequence, all before the boldest certified candidate are certified too.
        sure = (certificate.get("in_sequence") or [])[: certificate.get("certified", 0)]
        return "held" if outcome.chosen.proposal.digest in sure else "undecided"
    return "held" if certificate["status"] == "certified" else "undecided"


def _taken(front: list[Candidate], number: int) -> Candidate:
    good = isinstance(number, int) and 0 <= number < len(front)
    check("compress", (good, "no such point of the front", number, f"0..{len(front) - 1}"))
    return front[number]


def _point(number: int, item: Candidate, outcome: SearchOutcome, folder: Path) -> dict[str, Any]:
    facts = {k: item.facts.get(k) for k in ("bytes", "drop", "parameters", "macs", "ms")}
    return {
        "number": number,
        "what": item.proposal.words(),
        **facts,
        "holds": item.passed,
        "chosen": item.proposal == outcome.chosen.proposal,
        "file": item.path.relative_to(folder.absolute()).as_posix(),
    }


def _warnings(
    request: SearchRequest, runner: Runner, outcome: SearchOutcome, notes: list[str]
) -> list[str]:
    task, dense, limit = request.task, outcome.dense.facts, request.budgets.max_drop
    untrained, value, warnings = dense.get("untrained"), dense["validation"], list(notes)
    if untrained is not None and task.drop(untrained, value) > 0:
        moved = "lowered" if task.direction == "max" else "raised"
        warnings.append(
            f"training {moved} the {task.metric_name} on the validation split, and so made it worse:"
            f" {untrained:.6g} before, {value:.6g} after"
        )
    if not runner.prunable():
        warnings.append(
            "no weight of the network can be pruned: it was quantized and packed only; the reasons"
            " are below"
        )
    shares = untrained is not None and 0 <= untrained <= 1 and 0 <= value <= 1
    if limit is not None and limit >= 1 and shares:
        warnings.append(
            f"if the {task.metric_name} is a share of 0..1, the budget of {limit:g} allows any"
            f" network; {limit:g} points are {limit / 100:g}"
        )
    failed = [item for item in (*outcome.rungs, *outcome.files) if item.failure is not None]
    return warnings + [f"{item.work.stage} failed: {item.failure}" for item in failed]


def _publish(result: dict[str, Any], outcome: SearchOutcome, path: Path) -> None:
    if not result["verified"]:
        raise KarikomiError(
            "the packed file does not give back the network, so it was not published",
            where=str(outcome.chosen.path),
            hint="delete the run folder and run again; if it stays, report it",
        )
    write_bytes(path / "model.karikomi", outcome.chosen.path.read_bytes())
    write_bytes(path / "dense.safetensors", safetensors.numpy.save(outcome.dense.arrays))
    write_json(path / "result.json", result)


def _merged_record(run: SearchRun, found: Mapping[Proposal, Finished], path: Path) -> Path:
    """Write the rows of all candidates, in the order of the search, to the record of the run."""
    parts = []
    for proposal, item in found.items():
        if item.error is None:
            part = run.work(proposal).record
            if not part.exists():
                raise _lost(part)
            parts.append(part.read_bytes())
    write_bytes(path, b"".join(parts))
    return path


def _lost(path: Path) -> BadFile:
    return BadFile(
        "the record of this run is gone, and with it what the report needs",
        where=str(path),
        hint=AFRESH,
    )


def _remembered(folder: Folder, request: SearchRequest, runner: Runner) -> dict[str, Any]:
    now = runner.environment()
    if not request.inline and not request.task.recipe.threads:
        now["threads"] = 1  # as each worker has
    facts = folder.done("begin")
    if facts is None:
        folder.finish("begin", now)
        facts = now
    changed = sorted(key for key in now if facts.get(key) != now[key])
    if changed:
        _say(
            f"resumed with another {', '.join(changed)}: the bytes may differ from those of "
            "an uninterrupted run"
        )
    return {**now, "changed": changed}


def _say(text: str) -> None:
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


def _bar(request: SearchRequest) -> tqdm[Any]:
    # In a log file a line every ten seconds is enough.
    calm = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=epochs_of(request),
        desc=request.task.name,
        unit="epoch",
        disable=not request.progress,
        mininterval=calm,
    )
