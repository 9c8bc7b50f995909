"""`sweep`: the same training over a grid of settings with paired seeds, on workers, resumable, with an answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from karikomi import __version__, registry
from karikomi.errors import Unsupported, check
from karikomi.files import write_json
from karikomi.search.driver import Finished, RunJournal, drive, opened, source_digest
from karikomi.search.grid_account import answer_of
from karikomi.search.grid_answer import groups_of
from karikomi.search.grid_evaluation import AllAtOnce, evaluated, one_thread_each
from karikomi.search.grid_points import points_of, with_target
from karikomi.search.grid_setting import Setting, grid_of
from karikomi.search.grid_timing import AloneTimes
from karikomi.search.ladder import raise_failure
from karikomi.search.lock import claim, lock, read_json
from karikomi.search.rehearsal import rehearse_run
from karikomi.search.run_reference import OpenedRun, RunReference, TaskSource, keep_opened
from karikomi.tasks import Data, Runner, Task, checked_data, resolved

FORMAT = 2
"""The form of a sweep folder."""


def sweep(
    task: Task | str,
    *,
    limits: Sequence[float | None] = (0.1, 1.0, 10.0, None),
    rules: Sequence[Any] = (),
    bounds: Sequence[Any] = (None,),
    rates: Sequence[float | None] = (None,),
    sparsities: Sequence[float] = (0.0, 0.9),
    bits: Sequence[int | None] = (None,),
    seeds: int = 3,
    epochs: int | None = None,
    target: float | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    out: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a task at every setting of a grid with the same seeds, and return the answer and the figures of each point.

    `limits`: of the gradients' global norm, > 0; None and infinity clip nothing (norms are still measured). `rules`:
    clip rules beside the limits, as objects or texts such as ``"AutoClip(20)"``. `bounds`: bounds on the weights
    likewise; None is none. `rates`: learning rates, > 0; None is the recipe's. `sparsities`: in [0, 1), reached by
    gradual pruning within the same epochs. `bits`: grids of 2..16 bits that the trained weights are rounded to; None
    judges them as they are. `seeds`: how many, counted from 0. `epochs`: of each run, by default the recipe's.
    `target`: of the validation metric, for the epochs and seconds until it is reached; by default what the chosen
    setting reaches on average. `workers`: processes; `scheduler`: of a dask cluster. Each run has one thread
    unless the recipe names a number, so results do not depend on the workers. `out`: a folder, by
    default ``runs/sweep-<task>``; it keeps the journal of finished runs, one record of steps per run, and the
    result as ``sweep.json``. The same call on the same folder continues, also after a kill; more seeds or
    settings there are added to what is done. `data`: for a task that is given by name and needs a path. `progress`: a
    bar on stderr.

    The result has ``answer``: the chosen setting of each sparsity and size of grid, chosen on the validation split,
    with what is within noise, worse or diverging, and ``sentences`` that say so. ``points``: one per setting, with
    mean, min and max over its finished runs of ``validation``, ``accuracy`` (the task's metric on the test split),
    ``gap`` (by how much it is worse there than on the first 5,000 training examples), ``loss`` (of the last epoch),
    ``epochs_to_target``, ``seconds_to_target``, ``ms_per_step`` (measured alone), ``bytes`` (packed), ``macs`` and
    ``parameters`` (without dead units), ``ms`` (of a forward pass on 64 examples, measured alone), ``clipped`` and
    ``skipped`` (shares of steps); ``diverged`` counts runs that ended in non-finite numbers, and ``front`` whether no
    other point is better in validation metric and bytes. Times depend on the machine and decide nothing.

    Raises `InvalidArgument` for a grid out of range, and for a metric function that training lowered
    while its task has no ``goal``, `Unsupported` for a folder of another sweep, or one
    that another process is at work in.

    >>> grid = {"limits": (1.0,), "sparsities": (0.5,), "seeds": 1}
    >>> result = sweep("digits", **grid, epochs=1, progress=False)
    >>> result["points"][0]["runs"], result["points"][0]["bytes"]["mean"] < 60_000
    (1, True)
    """
    source = TaskSource(task, None if data is None else os.fspath(data))
    task = resolved(task, data, where="sweep")
    epochs = task.recipe.train_epochs if epochs is None else epochs
    axes = {"limits": limits, "rules": rules, "bounds": bounds, "rates": rates}
    settings = grid_of(**axes, sparsities=sparsities, bits=bits, seeds=seeds, epochs=epochs)
    whole_number = type(workers) is int and workers >= 1
    check("sweep", (whole_number, "the number of workers", repr(workers), ">= 1"))
    reachable = target is None or (isinstance(target, int | float) and math.isfinite(target))
    check("sweep", (reachable, "the target is a number", repr(target), "finite"))
    content = checked_data(task)
    folder = Path("runs") / f"sweep-{task.name}" if out is None else Path(out)
    whole = _opened(task, content, source, folder)
    if not os.path.exists(folder / "configuration.json"):  # noqa: PTH110  (as in `compress`)
        _rehearse(whole, settings)
    _refuse_earlier(folder)
    identity = _identity(whole)
    claim(folder / "configuration.json", identity)
    with lock(folder):
        alone = AloneTimes(folder, whole)
        text = json.dumps(identity, sort_keys=True)
        run = hashlib.sha256(text.encode()).hexdigest()[:16]
        places: Any = {"workers": workers, "scheduler": scheduler, "progress": progress}
        runs = _finished(whole, settings, alone, run, **places)
        result = _result(whole, runs, alone, target)
        write_json(folder / "sweep.json", result)
    return result


def _opened(task: Task, content: Data, source: TaskSource, folder: Path) -> OpenedRun:
    plain = one_thread_each(task)
    runner = registry.framework(plain.framework).runner_for(plain, content, seed=0)
    reference = RunReference(folder=str(folder.absolute()), run="", source=source, seed=0)
    return OpenedRun(reference, plain, content, runner)


def _rehearse(whole: OpenedRun, settings: Sequence[Setting]) -> None:
    """Take one batch through each kind of setting before anything is written."""
    _check_prunable(whole.task, whole.runner, settings)
    kinds: dict[Any, Setting] = {}
    for setting in sorted(settings, key=lambda setting: setting.sparsity):
        kinds[setting.rule, setting.bound] = setting
    for setting in kinds.values():
        rehearse_run(whole.task, whole.data, setting)


def _check_prunable(task: Task, runner: Runner, settings: Sequence[Setting]) -> None:
    if any(setting.sparsity for setting in settings) and not runner.prunable():
        alone = runner.left_alone()
        raise Unsupported(
            "no weight of the network can be pruned",
            where=f"task {task.name}",
            got="; ".join(f"{name}: {reason}" for name, reason in list(alone.items())[:3]),
            hint="sweep with sparsities=(0,)",
        )


def _refuse_earlier(folder: Path) -> None:
    known = read_json(folder / "configuration.json")
    if known is not None and "format" not in known:
        raise Unsupported(
            "the folder holds a sweep of an earlier version of karikomi, and is left as it is",
            where=str(folder),
            hint="choose another --out, or delete the folder; `sweep.json` and `sweep.html` stay readable",
        )


def _identity(whole: OpenedRun) -> dict[str, Any]:
    task, runner = whole.task, whole.runner
    return {
        "format": FORMAT,
        "karikomi": __version__,
        "task": task.name,
        "network": runner.describe(),
        "metric": task.metric_name,
        "goal": task.direction,
        "classes": [task.class_axis, task.ignore_index],
        "output": task.output,
        "data": whole.data.fingerprint(),
        "recipe": task.recipe.as_dict(),
        "code": task.fingerprint(),
        "weights": runner.fingerprint(),
        "environment": runner.environment(),
    }


def _finished(
    whole: OpenedRun,
    settings: Sequence[Setting],
    alone: AloneTimes,
    run: str,
    *,
    workers: int,
    scheduler: str | None,
    progress: bool,
) -> dict[Setting, Mapping[str, Any]]:
    """Return the facts of each setting, training those that the journal lacks."""
    reference = dataclasses.replace(whole.reference, run=run)
    if workers > 1 or scheduler is not None:
        reference.check_for_workers()
    each, done = settings[0].epochs, list[Finished]()
    bar = tqdm(total=len(settings) * each, desc="sweep", unit="epoch", disable=not progress)

    def on_epoch(stage: str, epochs: int) -> None:
        bar.update(epochs)

    def on_finished(found: Finished, again: bool) -> None:
        if found.error is not None:
            raise_failure(found)
        done.append(found)
        bar.set_postfix_str(Setting.of(found.proposal).words(), refresh=False)
        # What was read from the journal, diverged, or is of a worker did not report its epochs.
        bar.update(len(done) * each - bar.n)

    keep_opened(OpenedRun(reference, whole.task, whole.data, whole.runner, on_epoch))
    path = Path(reference.folder) / "journal.jsonl"
    journal = RunJournal(path, {"run": run, "source": source_digest()})
    with bar, journal, opened(workers, scheduler) as executor:
        for note in (*journal.notes, *alone.notes):
            tqdm.write(f"karikomi: {note}", file=sys.stderr)
        found = drive(
            AllAtOnce(settings),
            evaluated,
            journal=journal,
            executor=executor,
            seed=0,
            reference=reference,
            on_finished=on_finished,
            after_round=alone.measure,
        )
    return {setting: found[setting.proposal()].facts for setting in settings}


def _result(
    whole: OpenedRun,
    runs: Mapping[Setting, Mapping[str, Any]],
    alone: AloneTimes,
    target: float | None,
) -> dict[str, Any]:
    task = whole.task
    points = points_of(task, runs, alone)
    groups = groups_of(task, points)
    chosen = [points[g.chosen]["validation"]["mean"] for g in groups if g.chosen is not None]
    wanted = target if target is not None else (chosen[0] if chosen else None)
    batches = max(len(whole.data.train) // task.recipe.batch_size, 1)
    if wanted is not None:
        bar = wanted
        points = with_target(points, runs, lambda value: task.drop(bar, value) <= 0, batches)
    for group in groups:
        for place in group.places:
            points[place]["verdict"] = group.verdict(place)
    return {
        "task": task.name,
        "network": whole.runner.describe(),
        "seeds": list(dict.fromkeys(setting.seed for setting in runs)),
        "metric": task.metric_name,
        "goal": task.direction,
        "epochs": next(iter(runs)).epochs,
        "target": wanted,
        "answer": answer_of(task, points, groups),
        "points": points,
        "environment": {**whole.runner.environment(), "karikomi": __version__},
        "warnings": [warning for at, run in runs.items() if (warning := _warning(at, run))],
    }


def _warning(at: Setting, run: Mapping[str, Any]) -> str | None:
    if run["diverged"] is not None:
        return f"{at.words()}: diverged, left out of the figures ({run['diverged']})"
    if run["skipped"]:
        return f"{at.words()}: {run['skipped']:.0%} of the steps skipped, gradients not finite"
    return None
