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
from karikomi.audit.paired.confidences import LEAST, compared
from karikomi.audit.paired.mean_tests import drop_by_redrawing
from karikomi.audit.paired.paired_outcomes import PairedOutcomes
from karikomi.audit.paired.slices import mean_rows, members_of, risen_p, slice_rows
from karikomi.audit.population import population_of
from karikomi.audit.predictions import Predictions, score_of, shown_inputs
from karikomi.audit.robustness import gradient_agreement, under_noise
from karikomi.audit.stress import MOST_EXAMPLES, under_corruptions
from karikomi.errors import check
from karikomi.tasks import Arrays, Data, Runner, Split, Task, checked_data
from karikomi.tasks.example_scores import example_scores

MOST_LIKELIHOODS = 200_000
"""Targets (pixels, tokens) whose likelihoods are compared, evenly spread over all."""


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
    of each, flips, exact paired test, the smallest drop that n can show; slices also of any other metric that is a mean
    over examples), ``agreement`` (share of equal predictions),
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
    scores = [score_of(task, output, test.targets) for output in outputs]
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
        "gradient_agreement": gradient_agreement(run, pair, _counting(task, test)),
        "nonfinite": [int(np.sum(~examples)) for examples in finite],
        "corruptions": under_corruptions(
            task, run, pair, test, seed=seed, modality=modality, most=most
        ),
        "attack": attacked(task, run, pair, test, seed=seed),
        "layers": layer_rows(task, run, pair, test),
        "explanation": explained(task, run, pair, test, seed=seed),
        "costs": costs(run, pair, sizes),
    }
    reasons = _not_checked(task, test, result, slices)
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
    task: Task, test: Split, result: Mapping[str, Any], slices: Mapping[str, Any] | None
) -> dict[str, str]:
    """Return what an audit left out -> why."""
    form = _form(test.inputs)
    other = f"the metric is {task.metric_name}"
    reasons = {
        "classes": "" if task.classifies else other,
        "slices": "no slices were given"
        if not slices
        else f"{other}, which is not finite, or no mean of a number per example",
        "calibration": f"too few targets, or outputs that are not finite: {LEAST} are needed"
        if task.classifies
        else f"{other}: there are no class scores",
        "noise": form,
        "gradient_agreement": form,
        "corruptions": form or "there are none for inputs of this shape",
        "attack": form or "the metric is not finite",
        "explanation": f"{form}, nor tokens",
    }
    return {name: reason for name, reason in reasons.items() if reason and not result.get(name)}


def _counting(task: Task, test: Split) -> Split:
    """Return the examples with a target that counts: the loss of the others has no gradient in either network."""
    if not task.classifies:
        return test
    counts = (test.targets != task.ignore_index).reshape(len(test), -1).any(axis=1)
    return test if counts.all() else test.take(np.flatnonzero(counts))


def _form(inputs: Any) -> str:
    """Return why inputs have no gradients, noise or attacks; empty for one array of floats."""
    if not isinstance(inputs, np.ndarray):
        return f"the inputs are {len(inputs)} arrays"
    if inputs.dtype.kind == "f":
        return ""
    return f"the inputs are {inputs.dtype}, and not floats"


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
        rows = _other_slices(task, outputs, targets, slices)
        return {"classes": [], **unknown, "changed_examples": [], "slices": rows}
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
    risen = risen_p(first, second, np.unique(true), sources)
    for row, test, p in zip(facts["classes"], tests, risen, strict=True):
        row |= {name: test[name] for name in extra} | {"predicted_p": float(p)}
    groups = members_of(slices, places // several, len(targets))
    few = slice(None, None, -(-len(true) // MOST_LIKELIHOODS))
    likely = [np.moveaxis(output, task.class_axis, -1)[counts][few] for output in outputs]
    return {
        **facts,
        "outcomes": outcomes.facts(),
        "slices": slice_rows(outcomes, groups, sources=sources),
        "calibration": compared(
            likely[0],
            likely[1],
            true[few].astype(np.int64),
            sources=None if sources is None else sources[few],
        ),
    }


def _other_slices(
    task: Task, outputs: tuple[np.ndarray, ...], targets: np.ndarray, slices: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the rows of slices for a metric that is a mean of a number per example; none for any other."""
    if not slices:
        return []
    groups = members_of(slices, np.arange(len(targets)), len(targets))
    first, second = (example_scores(task, output, targets) for output in outputs)
    if first is None or second is None:
        return []
    worse = first - second if task.direction == "max" else second - first
    if not np.isfinite(worse).all():
        return []
    return mean_rows(worse, (first, second), groups)


def _of(targets: np.ndarray, label: str) -> np.ndarray:
    return np.flatnonzero(targets.astype(str) == label)
