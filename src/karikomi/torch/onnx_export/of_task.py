"""A stored network as an ONNX file, its code and its data taken from a task."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from karikomi.errors import BadFile
from karikomi.pack.models import load
from karikomi.tasks.splits import Data
from karikomi.tasks.task import Task
from karikomi.torch.onnx_export.export_report import OnnxExport
from karikomi.torch.onnx_export.to_file import export_onnx
from karikomi.torch.tasks.runner import runner_for
from karikomi.torch.tasks.training import batch_for

BATCH = 32


def export_task(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    task: Task,
    data: Data,
    *,
    examples: int = 512,
    **choices: Any,
) -> OnnxExport:
    """Write the network of a packed file as an ONNX file; `choices`: of `export_onnx`.

    The example is the first of the task's validation split. With integer activations their ranges are measured
    on the first `examples` of the training split, in batches of 32. Raises what `karikomi.load` and `export_onnx` do.
    """
    module = load(file, into=runner_for(task, data, seed=0).untrained())
    example = batch_for(
        module, data.validation.take(np.arange(min(2, len(data.validation)))).inputs
    )
    if not len(data.train):
        raise BadFile("the task has no training examples", where=f"task {task.name}")
    if choices.get("activations"):
        choices["data"] = list(_batches(module, data, examples))
    return export_onnx(module, dict(example.named) or example.positional, out, **choices)


def _batches(module: Any, data: Data, examples: int) -> Iterator[Any]:
    count = min(examples, len(data.train))
    for first in range(0, count, BATCH):
        part = data.train.take(np.arange(first, min(first + BATCH, count)))
        batch = batch_for(module, part.inputs)
        yield dict(batch.named) if batch.named else (batch.positional, None)
