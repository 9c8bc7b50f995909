"""A dry run of one batch, so that what is wrong with a task is found before its training, not after."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from karikomi import registry
from karikomi.errors import KarikomiError, NonFinite
from karikomi.search.driver import Budgets
from karikomi.search.grid_run import Run
from karikomi.search.grid_setting import Setting
from karikomi.search.search_run import SearchRequest, searched
from karikomi.search.timed_recorder import TimedRecorder
from karikomi.tasks import Data, Runner, Task
from karikomi.tasks.metrics import check_labels
from karikomi.tasks.user_code import cause


def rehearse(request: SearchRequest) -> float:
    """Take one batch through all steps of a search and a file; return the metric of the network before them.

    The metric is that on the validation split, which is whole: a metric may be undefined on few examples. The
    outputs on the test split are judged once, so that labels are checked. Raises the `KarikomiError` of
    the first step that does not run.
    """
    task, recipe = request.task, request.task.recipe
    short = dataclasses.replace(
        recipe,
        train_epochs=1,
        prune_epochs=1,
        tune_epochs=1,
        widths=recipe.widths[-1:],
        sparsities=recipe.sparsities[:1],
        entries=recipe.entries[:1],
        rates=(),
        learned=(),
    )
    # The goal is stated: one batch of training may move the metric either way.
    brief = dataclasses.replace(task, recipe=short, goal=task.direction)
    with _explained(task), tempfile.TemporaryDirectory(prefix="karikomi-") as path:
        runner, small = _on_one_batch(brief, request.content, request.seed)
        _check_splits(brief, runner, request.content, small)
        some = dataclasses.replace(
            request,
            task=brief,
            content=small,
            budgets=Budgets(),
            workers=1,
            scheduler=None,
            integers=False,
        )
        dense = searched(some, runner, Path(path) / "run").dense.facts
        return dense["validation"] if dense.get("untrained") is None else dense["untrained"]


def rehearse_run(task: Task, data: Data, setting: Setting) -> None:
    """Take one batch through a run of a sweep, its figures and its file; raises as `rehearse` does."""
    brief = dataclasses.replace(task, goal=task.direction)
    with _explained(task), tempfile.TemporaryDirectory(prefix="karikomi-") as path:
        runner, small = _on_one_batch(brief, data, setting.seed)
        _check_splits(brief, runner, data, small)
        run = Run(brief, small, runner, dataclasses.replace(setting, epochs=1))
        # A run that diverges is a result of a sweep.
        recorder = TimedRecorder(Path(path) / "record.jsonl")
        with recorder, suppress(NonFinite):
            run.trained(recorder, lambda: None)


def _on_one_batch(task: Task, data: Data, seed: int) -> tuple[Runner, Data]:
    size = min(len(data.train), task.recipe.batch_size)
    small = Data(data.train.take(np.arange(size)), data.validation, data.test, data.certify)
    return registry.framework(task.framework).runner_for(task, small, seed=seed), small


def _check_splits(task: Task, runner: Runner, data: Data, small: Data) -> None:
    arrays, where = runner.fresh(), f"task {task.name}"
    if task.classifies:
        outputs = runner.outputs(arrays, small.train.inputs)
        task.predictions(outputs, small.train.targets)
        classes, label = outputs.shape[task.class_axis], task.ignore_index
        check_labels(data.train.targets, classes, ignore_index=label, where=f"{where}: train")
    task.judge(runner.outputs(arrays, data.test.inputs), data.test.targets)


@contextmanager
def _explained(task: Task) -> Iterator[None]:
    try:
        yield
    except KarikomiError:
        raise
    except Exception as error:
        raise KarikomiError(
            "one batch could not be taken through training, pruning, quantization and packing",
            where=f"task {task.name}",
            got=cause(error),
        ) from error
