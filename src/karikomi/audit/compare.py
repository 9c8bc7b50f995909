"""Compare two networks on the same test split: figures, and warnings about them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from karikomi import registry
from karikomi.audit.alarms import alarms
from karikomi.audit.predictions import Predictions
from karikomi.audit.robustness import gradient_agreement, under_noise
from karikomi.errors import check
from karikomi.tasks import Arrays, Data, Runner, Task, checked_data


def audit(
    task: Task,
    before: Arrays,
    after: Arrays,
    *,
    seed: int = 0,
    runner: Runner | None = None,
    data: Data | None = None,
    labels: tuple[str, str] = ("before", "after"),
    notes: Iterable[Mapping[str, str]] = (),
) -> dict[str, Any]:
    """Return the differences of `after` from `before` on a task's test split, as plain data.

    `before`, `after`: the arrays of one network of the task each; shapes may be smaller after a
    shrink. `seed`: of the noise. `runner`, `data`: by default those of the task. `labels`: names of
    the two in the result. `notes`: those of their files, which say how a shrunk network is built.

    The keys: ``metric_before``, ``metric_after``; with the metric ``"accuracy"`` also ``classes``
    (accuracy of each), ``agreement`` (share of equal predictions), ``changed``, ``lost`` and
    ``gained`` (counts) and up to 20 ``changed_examples``, lost ones first; ``noise`` (the metric
    under Gaussian noise of ``sigma`` times the inputs' standard deviation); ``gradient_agreement``
    (cosines between the loss's gradients by the input, over up to 512 examples); and ``warnings``,
    each with its numbers. With another metric the keys of predictions are empty or None, with a
    warning. A non-finite output counts by its comparisons, with a warning.

    Raises `InvalidArgument` for arrays that do not fit the task's network and for a negative seed,
    and the errors of loading the data.

    >>> import karikomi as kk
    >>> task = kk.tasks.load("digits")
    >>> arrays = kk.registry.framework("torch").runner_for(task, task.data(), seed=0).fresh()
    >>> result = audit(task, arrays, arrays)
    >>> result["agreement"], result["changed"], result["warnings"]
    (1.0, 0, [])
    """
    good = type(seed) is int and seed >= 0
    check("audit", (good, "the seed is a whole number", seed, ">= 0"))
    data = checked_data(task) if data is None else data
    run: Runner = runner or registry.framework(task.framework).runner_for(task, data, seed=seed)
    for known in notes:
        run.adopt(known)
    pair, test = (before, after), data.test
    outputs = tuple(run.outputs(arrays, test.inputs) for arrays in pair)
    scores = [task.judge(output, test.targets) for output in outputs]
    metrics = [float(score) if math.isfinite(score) else None for score in scores]
    finite = (np.isfinite(output.reshape(len(output), -1)).all(axis=1) for output in outputs)
    result: dict[str, Any] = {
        "task": task.name,
        "before": labels[0],
        "after": labels[1],
        "examples": len(test),
        "metric": task.metric_name,
        "goal": task.direction,
        "metric_before": metrics[0],
        "metric_after": metrics[1],
        **_predictions(task, outputs, test.targets),
        "noise": under_noise(task, run, pair, test, seed=seed),
        "gradient_agreement": gradient_agreement(run, pair, test),
        "nonfinite": [int(np.sum(~examples)) for examples in finite],
    }
    return {**result, "warnings": alarms(result)}


def _predictions(
    task: Task, outputs: tuple[np.ndarray, ...], targets: np.ndarray
) -> dict[str, Any]:
    if not task.classifies:
        unknown = dict.fromkeys(("agreement", "changed", "lost", "gained"))
        return {"classes": [], **unknown, "changed_examples": []}
    (before, counts), (after, _) = (task.predictions(output, targets) for output in outputs)
    places = np.flatnonzero(counts)
    return Predictions(targets[counts], before[counts], after[counts], places).facts()
