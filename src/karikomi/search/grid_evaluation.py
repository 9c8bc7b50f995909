"""The runs of a sweep on the search's driver: each is a pure function of its setting and the sweep it belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from karikomi import registry
from karikomi.search.driver import Finished, Measured, Proposal
from karikomi.search.grid_run import Run
from karikomi.search.grid_setting import Setting
from karikomi.search.run_reference import OpenedRun, RunReference, opened_run
from karikomi.tasks import Runner, Task


class AllAtOnce:
    """The strategy of a grid: one round with every setting."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        self._proposals = [setting.proposal() for setting in settings]

    def propose(self, finished: Mapping[Proposal, Finished]) -> Sequence[Proposal]:
        """Return all settings, in their order."""
        return self._proposals


def evaluated(proposal: Proposal, seed: int, reference: RunReference) -> Measured:
    """Train one setting; its own seed is in the proposal, and depends on neither worker nor order."""
    opened = opened_run(reference)
    setting = Setting.of(proposal)
    run = run_of(opened, setting)
    record = Path(reference.folder) / "runs" / f"{setting.name}.jsonl"
    facts = run.measure(record, lambda: opened.on_epoch("train", 1))
    return Measured(facts, record.relative_to(reference.folder).as_posix())


def run_of(opened: OpenedRun, setting: Setting) -> Run:
    """Return the run of a setting in an opened sweep."""
    task = one_thread_each(opened.task)
    return Run(task, opened.data, runner_of(task, opened, setting.seed), setting)


def runner_of(task: Task, opened: OpenedRun, seed: int) -> Runner:
    """Return the runner of a seed."""
    return registry.framework(task.framework).runner_for(task, opened.data, seed=seed)


def one_thread_each(task: Task) -> Task:
    """Return a task that trains with one thread where its recipe names no number.

    So the results do not depend on how many runs go on at once.
    """
    recipe = task.recipe
    return dataclasses.replace(
        task, recipe=dataclasses.replace(recipe, threads=recipe.threads or 1)
    )
