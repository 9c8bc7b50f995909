"""Checks of a trained network before any work: its metric is defined, moves the stated way, and beats a guess."""

from __future__ import annotations

from typing import Any

import numpy as np

from karikomi.errors import InvalidArgument, NonFinite
from karikomi.tasks import Arrays, Runner, Split, Task


def check_dense(task: Task, runner: Runner, arrays: Arrays, split: Split) -> dict[str, Any]:
    """Return the metric of a trained network and what it was compared with; raise where it cannot be compressed.

    With an accuracy it must be right more often than the most frequent class. With any metric it must be better, in
    the stated direction, than its own outputs in another order of the examples: a metric that is not has the wrong
    ``goal``, or targets that are not those of the inputs. A metric of a score must not be 0.

    Raises `NonFinite`, naming the first tensor with NaN or the number of such examples, and `InvalidArgument`.
    """
    where = f"task {task.name}"
    for name, array in arrays.items():
        # Infinite ones can be meant: masks of attention.
        if array.dtype.kind == "f" and (bad := int(np.isnan(array).sum())):
            raise NonFinite(
                "the trained network has NaN",
                where=f"{where}: {name}",
                got=f"{bad} of {array.size}",
            )
    outputs = runner.outputs(arrays, split.inputs)
    wrong = np.isnan(outputs).reshape(len(outputs), -1).any(axis=1)
    if wrong.any():
        raise NonFinite(
            "the outputs of the trained network are NaN",
            where=where,
            got=f"{int(wrong.sum())} of {len(outputs)} validation examples, the first number {int(np.argmax(wrong))}",
            hint="check the inputs for NaN, and for values that overflow",
        )
    value = task.judge(outputs, split.targets)
    facts: dict[str, Any] = {"metric": value}
    if task.classifies:
        share, label = _majority(task, split)
        facts |= {"majority": share, "majority_class": label}
        if value <= share:
            raise InvalidArgument(
                "the trained network is no better than one that always answers the most frequent class",
                where=where,
                got=f"accuracy {value:.4g}, class {label} is {share:.4g} of the targets",
                hint="check the preprocessing of the data, the order of the classes, and the weights",
            )
    if value == 0 and task.direction == "max":
        raise InvalidArgument(
            f"the {task.metric_name} of the trained network is 0",
            where=where,
            hint='check the metric and the data; goal="min" for an error',
        )
    moved = np.roll(np.arange(len(split)), max(len(split) // 2, 1))
    other = task.judge(outputs[moved], split.targets)
    facts["mismatched"] = other
    if task.drop(other, value) > 0:
        raise InvalidArgument(
            f"the {task.metric_name} is better when the outputs are given to other examples",
            where=where,
            got=f"{value:.6g}, and {other:.6g} with outputs and targets mismatched, as goal={task.direction!r}",
            allowed=f'goal="{"min" if task.direction == "max" else "max"}", or targets that fit the inputs',
        )
    return facts


def _majority(task: Task, split: Split) -> tuple[float, int]:
    counted = split.targets[split.targets != task.ignore_index]
    classes, counts = np.unique(counted, return_counts=True)
    place = int(np.argmax(counts))
    return float(counts[place] / counts.sum()), int(classes[place])
