"""Compare two networks on the same test split: figures, and warnings about them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from karikomi import registry
from karikomi.audit.alarms import alarms
from karikomi.audit.attacks import attacked
from karikomi.audit.attribution.explanation import explained
from karikomi.audit.costs import costs
from karikomi.audit.layers import layer_rows
from karikomi.audit.paired.confidences import compared
from karikomi.audit.paired.mean_tests import drop_by_redrawing
from karikomi.audit.paired.paired_outcomes import PairedOutcomes
from karikomi.audit.paired.slices import members_of, slice_rows
from karikomi.audit.population import population_of
from karikomi.audit.predictions import Predictions, shown_inputs
from karikomi.audit.robustness import gradient_agreement, under_noise
from karikomi.audit.stress import MOST_EXAMPLES, under_corruptions
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
    slices: Mapping[str, Any] | None = None,
    modality: str | None = None,
    most: int = MOST_EXAMPLES,
    population: int = 0,
    replicates: Sequence[Arrays] = (),
    originals: Sequence[Arrays] = (),
    sizes: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Return the differences of `after` from `before` on a task's test split, as plain data.

    `before`, `after`: the arrays of one network of the task each; shapes may be smaller after a
    shrink. `seed`: of the noise. `runner`, `data`: by default those of the task. `labels`: names of
    the two in the result. `notes`: those of their files, which say how a shrunk network is built.

    `slices`: name -> a boolean, or a label, per test example: groups that must not pay. `modality`: ``"image"``,
    ``"tokens"`` or ``"signal"`` where the shape of the inputs does not tell. `most`: examples, from the start of the
    split, that are corrupted (50 evaluations of both networks each).

    `population`: audit so many further small networks, drawn by the rounding errors of `after`; `replicates` and
    `originals`: or these, made by you as `after` and `before` were (see `audit.population`). `sizes`: bytes of both
    files; with them times are measured too.

    The keys: ``metric_before``, ``metric_after``, ``drop`` and its ``drop_interval``; with the metric ``"accuracy"``
    also ``outcomes`` (drop, negative and positive flips, churn, with intervals), ``classes`` and ``slices`` (accuracy
    of each, flips, exact paired test, the smallest drop that n can show), ``agreement`` (share of equal predictions),
    ``changed``, ``lost`` and ``gained`` (counts), up to 20 ``changed_examples``, lost ones first, ``changed_inputs``
    of some, and ``calibration``; ``corruptions`` (see `audit.stress`), ``attack`` (see `audit.attacks`),
    ``explanation`` (see `audit.attribution.explanation`), ``layers`` (see `audit.layers`), ``population``, ``costs``
    (see files of these names), ``noise`` (the metric under Gaussian noise of ``sigma`` times the inputs' standard
    deviation) and ``gradient_agreement`` (cosines between the loss's gradients by the input, over up to 512 examples);
    ``not_checked``, what was left out and why; and ``warnings``, each with its numbers. A non-finite output counts by
    its comparisons, with a warning.

    Raises `InvalidArgument` for arrays that do not fit the task's network and for a negative seed,
    and the errors of loading the data.

    >>> import karikomi as kk
    >>> task = kk.tasks.load("digits")
    >>> arrays = kk.registry.framework("torch").runner_for(task, task.data(), seed=0).fresh()
    >>> result = audit(task, arrays, arrays)
    >>> result["agreement"], result["changed"], result["warnings"]
    (1.0, 0, [])
    """
    for name, number in (("seed", seed), ("population", population)):
        good = type(number) is int and number >= 0
        check("audit", (good, f"the {name} is a whole number", number, ">= 0"))
    given = not (population and replicates)
    check("audit", (given, "population= draws networks, replicates= gives them", None, "either"))
    data = checked_data(task) if data is None else data
    run: Runner = runner or registry.framework(task.framework).runner_for(task, data, seed=seed)
    for known in notes:
        run.adopt(known)
    pair, test = (before, after), data.test
    outputs = run.outputs(before, test.inputs), run.outputs(after, test.inputs)
    scores = [task.judge(output, test.targets) for output in outputs]
    metrics = [float(score) if math.isfinite(score) else None for score in scores]
    finite = [np.isfinite(output.reshape(len(output), -1)).all(axis=1) for output in outputs]
    result: dict[str, Any] = {
        "task": task.name,
        "before": labels[0],
        "after": labels[1],
        "examples": len(test),
        "metric": task.metric_name,
        "goal": task.direction,
        "metric_before": metrics[0],
        "metric_after": metrics[1],
        "drop": None if None in metrics else task.drop(*scores),
        "drop_interval": drop_by_redrawing(task, outputs, test.targets, seed=seed),
        **_predictions(task, outputs, test.targets, slices or {}),
        "noise": under_noise(task, run, pair, test, seed=seed),
        "gradient_agreement": gradient_agreement(run, pair, test),
        "nonfinite": [int(np.sum(~examples)) for examples in finite],
        "corruptions": under_corruptions(
            task, run, pair, test, seed=seed, modality=modality, most=most
        ),
        "attack": attacked(task, run, pair, test, seed=seed),
        "layers": layer_rows(task, run, pair, test),
        "explanation": explained(task, run, pair, test, seed=seed),
        "costs": costs(run, pair, sizes),
    }
    reasons = _not_checked(task, result, slices)
    result["changed_inputs"] = shown_inputs(
        task, test, result["changed_examples"], test.targets[0].size or 1
    )
    several = population_of(
        task, run, pair, test, outputs, seed, population, (replicates, originals)
    )
    if isinstance(several, str):
        reasons["population"], several = several, None
    result |= {"population": several, "not_checked": reasons}
    return {**result, "warnings": alarms(result)}


def _not_checked(
    task: Task, result: Mapping[str, Any], slices: Mapping[str, Any] | None
) -> dict[str, str]:
    """Return what an audit left out -> why."""
    several = "the inputs are several arrays, or of a kind without this check"
    reasons = {
        "classes": "" if task.classifies else f"the metric is {task.metric_name}",
        "slices": "" if slices else "no slices were given",
        "calibration": ""
        if result["calibration"]
        else "the outputs are no class scores (n, classes)",
        "noise": "" if result["noise"] else "the inputs are not floats, or several arrays",
        "gradient_agreement": ""
        if result["gradient_agreement"]
        else "the inputs are not floats, or several arrays",
        "corruptions": "" if result["corruptions"] else several,
        "attack": "" if result["attack"] else "the inputs are not one array of floats",
        "explanation": "" if result["explanation"] else several,
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _predictions(
    task: Task,
    outputs: tuple[np.ndarray, ...],
    targets: np.ndarray,
    slices: Mapping[str, Any],
) -> dict[str, Any]:
    if not task.classifies:
        unknown = dict.fromkeys(
            ("agreement", "changed", "lost", "gained", "outcomes", "calibration")
        )
        return {"classes": [], **unknown, "changed_examples": [], "slices": []}
    (before, counts), (after, _) = (task.predictions(output, targets) for output in outputs)
    places = np.flatnonzero(counts)
    true, first, second = targets[counts], before[counts], after[counts]
    outcomes = PairedOutcomes(first == true, second == true, first != second)
    facts = Predictions(true, first, second, places).facts()
    several = targets[0].size or 1
    sources = places // several if several > 1 else None
    labels = {row["class"]: _of(true, row["class"]) for row in facts["classes"]}
    tests = slice_rows(outcomes, labels, sources=sources)
    extra = ("lost", "gained", "drop_interval", "p", "least_drop", "named")
    for row, test in zip(facts["classes"], tests, strict=True):
        row |= {name: test[name] for name in extra}
    groups = members_of(slices, places // several, len(targets))
    plain = outputs[0].ndim == 2 and bool(counts.all()) and task.class_axis % 2 == 1
    return {
        **facts,
        "outcomes": outcomes.facts(),
        "slices": slice_rows(outcomes, groups, sources=sources),
        "calibration": compared(outputs[0], outputs[1], targets) if plain else None,
    }


def _of(targets: np.ndarray, label: str) -> np.ndarray:
    return np.flatnonzero(targets.astype(str) == label)
