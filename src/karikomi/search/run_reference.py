"""What an evaluation refers to: the run folder, the task and the data, opened once in each process."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from karikomi import registry
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.search.driver import Proposal, source_digest
from karikomi.tasks import Data, Runner, Task, checked_data, configured, load

OnEpoch = Callable[[str, int], object]
"""Called with the stage and the number of epochs that are newly done, or were before."""


@dataclass(frozen=True, slots=True)
class TaskSource:
    """How a process comes by the task: the task itself, or its name with the path of its data and its recipe."""

    task: Task | str
    data: str | None = None
    config: Mapping[str, Any] | str | None = None

    def opened(self) -> Task:
        """Return the task."""
        found = self.task if isinstance(self.task, Task) else load(self.task, data=self.data)
        return found if self.config is None else configured(found, self.config)


@dataclass(frozen=True, slots=True)
class RunReference:
    """A run that candidates belong to; small, so that it goes to any worker.

    `folder`: which every worker can read and write. `run`: a digest of what all its candidates share. `weights`:
    the file of a trained network, where the task's own is not to be trained.
    """

    folder: str
    run: str
    source: TaskSource
    seed: int
    weights: str | None = None
    code: str = field(default_factory=source_digest)

    def folder_of(self, proposal: Proposal) -> Path:
        """Return the folder of a candidate."""
        return Path(self.folder) / "candidates" / f"{proposal.digest}-{self.run[:8]}"

    def check_for_workers(self) -> None:
        """Raise `InvalidArgument` where the reference cannot be sent to another process."""
        try:
            pickle.dumps(self)
        except Exception as error:  # noqa: BLE001  (pickle raises whatever the objects raise)
            raise InvalidArgument(
                "the task cannot be sent to other processes",
                where="workers",
                got=f"{type(error).__name__}: {error}",
                hint="name it (package.module:attribute, or a .py file), or use one worker",
            ) from error


@dataclass(slots=True)
class OpenedRun:
    """A run in one process: task, data, runner. `on_epoch` is called where candidates are of this process."""

    reference: RunReference
    task: Task
    data: Data
    runner: Runner
    on_epoch: OnEpoch = lambda stage, epochs: None
    weights: dict[str, np.ndarray] | None = None


_opened: dict[str, OpenedRun] = {}


def keep_opened(run: OpenedRun) -> None:
    """Use this run for its reference in this process, in place of one that was opened before."""
    _opened.clear()
    _opened[run.reference.run] = run


def opened_run(reference: RunReference) -> OpenedRun:
    """Return the run of a reference, loading task and data where this process has not.

    Raises `Unsupported` where this process has other code than the one that began the search.
    """
    if reference.code != source_digest():
        raise Unsupported(
            "this worker has another version of karikomi than the search",
            where="worker",
            hint="install the same on all machines",
        )
    if reference.run not in _opened:
        task = reference.source.opened()
        data = checked_data(task)
        runner = registry.framework(task.framework).runner_for(task, data, seed=reference.seed)
        keep_opened(OpenedRun(reference, task, data, runner))
    return _opened[reference.run]
