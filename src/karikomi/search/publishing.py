"""From finished candidates to what a run publishes: the certificate, the chosen file, the result beside it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from karikomi.errors import BadFile, KarikomiError, check
from karikomi.files import tensor_file, write_bytes, write_json
from karikomi.search.candidate_steps import course_of
from karikomi.search.certifying import certified, stated_beforehand
from karikomi.search.driver import Finished, Proposal
from karikomi.search.folder import Folder
from karikomi.search.forms_written import forms_written
from karikomi.search.lock import AFRESH
from karikomi.search.measured import measured, running
from karikomi.search.model_card import NAME, command_of, model_card
from karikomi.search.result import clip_summary, describe
from karikomi.search.search_outcome import Candidate, SearchOutcome, outcome_of
from karikomi.search.search_run import SearchRequest, SearchRun, epochs_of, identity_of, say
from karikomi.search.taken_over import certificates_before, evaluated_by, take_over
from karikomi.tasks import Runner


def completed(request: SearchRequest, runner: Runner, folder: Folder) -> dict[str, Any]:
    """Search in an opened run folder, certify, publish, and return the result."""
    task, budgets = request.task, request.budgets
    environment = _remembered(folder, request, runner)
    before = stated_beforehand(task, request.content, budgets.max_drop)
    if before is not None and before.verdict != "can" and request.progress and not folder.resumed:
        say(before.sentence())
    whole = identity_of(request, runner)
    if request.reuse is not None:
        take_over(request.reuse, folder.path, whole)
    identity = json.dumps(evaluated_by(whole), sort_keys=True)
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
            task,
            request.content,
            runner,
            outcome,
            folder,
            max_drop=budgets.max_drop,
            seed=request.seed,
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
        **measured(runner, outcome, folder, most=len(request.content.validation)),
        "front": [_point(number, item, outcome, folder.path) for number, item in enumerate(front)],
        "taken": request.take,
        "command": command_of(request),
        "source": _source(request),
    }
    result["running"] = running(result)
    if "widths_before" in result["shrink"]:
        # Times in turn of the chosen file, in place of those of its shrink.
        times = {key: result[key] for key in ("ms_before", "ms_after")}
        result["shrink"] |= {**times, "verdict": result["running"]}
    result["warnings"] += _warnings(request, runner, outcome, run.latency.notes)
    if shared := certificate.get("also_in_validation"):
        result["warnings"].append(
            f"{shared} of the {certificate['n']} certify examples are in the validation split too,"
            " on which the choices were made"
        )
    earlier = certificates_before(request.reuse) if request.reuse is not None else 0
    if earlier and certificate["status"] != "not run":
        result["warnings"].append(
            f"the certify examples served {earlier} certificate{'s' if earlier > 1 else ''} in {request.reuse}:"
            f" that all of them are right is sure to {1 - (earlier + 1) * certificate['alpha']:.0%} only"
        )
    _publish(result, outcome, folder.path)
    result["exports"] = forms_written(runner, outcome, request.forms, folder)
    for row in result["exports"]:
        if row["reason"]:
            result["warnings"].append(f"{row['form']} was not written: {row['reason']}")
    write_bytes(folder.path / NAME, model_card(result, request).encode())
    write_json(folder.path / "result.json", result)
    return result


def _source(request: SearchRequest) -> dict[str, Any]:
    """Return how the task was named, so that `karikomi export` finds its code and data again."""
    named = request.source.task
    return {"task": named if isinstance(named, str) else None, "data": request.source.data}


def _followed(run: SearchRun) -> dict[Proposal, Finished]:
    request = run.request
    with _bar(request) as bar:

        def on_epoch(stage: str, epochs: int) -> None:
            bar.set_postfix_str(stage, refresh=False)
            bar.update(epochs)

        def on_finished(found: Finished, again: bool) -> None:
            work = run.work(found.proposal)
            if found.error is not None:
                say(f"{work.stage} failed: {found.error['kind']}: {found.error['text']}")
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
        "what": course_of(item.proposal),
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
    write_bytes(path / "dense.safetensors", tensor_file(outcome.dense.arrays))


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
        say(
            f"resumed with another {', '.join(changed)}: the bytes may differ from those of "
            "an uninterrupted run"
        )
    return {**now, "changed": changed}


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
