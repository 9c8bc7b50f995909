"""What two networks look at: attributions of the class that the first predicts, between a floor and a ceiling."""

from __future__ import annotations

from typing import Any

import numpy as np

from karikomi.audit.attribution.attributions import STEPS, agreement, integrated, summary
from karikomi.audit.corruptions.disturbed_input import DisturbedInput, disturbed_input
from karikomi.audit.paired.paired_outcomes import holm
from karikomi.tasks import Arrays, Runner, Split, Task
from karikomi.tasks.example_scores import example_scores

MOST_EXAMPLES = 128
MOST_TOKEN_EXAMPLES = 48
MOST_TOKENS = 48
LEAST_OF_CLASS = 5
SHOWN = 4
"""Examples whose attributions the result carries, those that agree least and most."""


def explained(
    task: Task, runner: Runner, pair: tuple[Arrays, Arrays], split: Split, *, seed: int
) -> dict[str, Any] | None:
    """Return how far the attributions of both networks agree; None for inputs without any.

    For floats integrated gradients of the loss for what the first network predicts, against the mean input; for tokens
    (also beside their mask) the change of its score when a token is replaced by its neighbour. ``measures``: cosine,
    rank correlation and overlap of the top tenth, each with ``networks``, ``floor`` (an untrained network instead of
    the second), ``ceiling`` (the first network against itself with half the steps, or the other neighbour), and
    ``place``, 0 at the floor and 1 at the ceiling. ``classes``: cosine of each predicted class with an adjusted p that
    it is lower than that of the others. ``examples``, ``method``; ``shown``: inputs and attributions of some examples.
    """
    tokens = _has_tokens(split)
    if not tokens and not (isinstance(split.inputs, np.ndarray) and split.inputs.dtype.kind == "f"):
        return None
    some = split.take(_spread(len(split), MOST_TOKEN_EXAMPLES if tokens else MOST_EXAMPLES, seed))
    predicted = runner.outputs(pair[0], some.inputs)
    some = Split(some.inputs, _explained(task, predicted, some.targets))
    method = _occlusion if tokens else _gradients
    untrained = runner.fresh()
    fitting = {n: a.shape for n, a in untrained.items()} == {n: a.shape for n, a in pair[0].items()}
    maps = [method(task, runner, arrays, some, fine=True) for arrays in pair]
    other = method(
        task, runner, untrained if fitting else _shuffled(pair[0], seed), some, fine=True
    )
    rough = method(task, runner, pair[0], some, fine=False)
    parts = {
        "networks": agreement(*maps),
        "floor": agreement(maps[0], other),
        "ceiling": agreement(maps[0], rough),
    }
    classes = _classes(task, predicted, parts["networks"]["cosine"])
    return {
        "method": "occlusion" if tokens else "integrated gradients",
        "examples": len(some),
        "measures": summary(parts),
        "classes": classes,
        "shown": _shown(
            task if tokens else None,
            _explained_input(some).array,
            maps,
            parts["networks"]["cosine"],
        ),
    }


def _has_tokens(split: Split) -> bool:
    given = disturbed_input(split.inputs)
    return given is not None and given.array.dtype.kind in "iu" and given.array.ndim == 2


def _explained_input(split: Split) -> DisturbedInput:
    """Return the array that attributions are of: all inputs, or the tokens among them."""
    given = None if isinstance(split.inputs, np.ndarray) else disturbed_input(split.inputs)
    return given or DisturbedInput(split.inputs, None, np.asarray(split.inputs))


def _spread(total: int, most: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).permutation(total)[:most]
    return np.sort(drawn)


def _explained(task: Task, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the targets whose loss is explained: the predicted classes; for others the true ones."""
    if not task.classifies:
        return targets
    found, counts = task.predictions(outputs, targets)
    return np.where(counts & (found >= 0), found, targets).astype(targets.dtype)


def _gradients(
    task: Task, runner: Runner, arrays: Arrays, split: Split, *, fine: bool
) -> np.ndarray:
    inputs = np.asarray(split.inputs)
    baseline = np.broadcast_to(inputs.mean(axis=0, keepdims=True), inputs.shape)

    def slopes(given: np.ndarray) -> np.ndarray:
        targets = np.concatenate([split.targets] * (len(given) // len(inputs)))
        return -runner.input_gradients(arrays, given, targets) * len(given)

    return integrated(slopes, inputs, baseline, steps=STEPS if fine else STEPS // 2)


def _occlusion(
    task: Task, runner: Runner, arrays: Arrays, split: Split, *, fine: bool
) -> np.ndarray:
    """Return how much each token counts: the fall of the largest output if a neighbour takes its place."""
    given = _explained_input(split)
    inputs = given.array
    whole = _scores(task, runner.outputs(arrays, split.inputs), split.targets)
    steps = np.unique(np.linspace(0, inputs.shape[1] - 1, MOST_TOKENS).astype(int))
    found = np.zeros(inputs.shape)
    for step in steps.tolist():
        without = inputs.copy()
        without[:, step] = inputs[:, (step + (-1 if fine else 1)) % inputs.shape[1]]
        outputs = runner.outputs(arrays, given.replaced(without))
        found[:, step] = whole - _scores(task, outputs, split.targets)
    return found


def _scores(task: Task, outputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return a smooth score of each example: the log probability of its target, or minus its error."""
    if task.classifies:
        wide = np.moveaxis(outputs.astype(np.float64), task.class_axis, -1)
        wide = wide - wide.max(axis=-1, keepdims=True)
        logs = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
        safe = np.where(targets == task.ignore_index, 0, targets)
        chosen = np.take_along_axis(logs, safe[..., None], axis=-1)[..., 0]
        return chosen.reshape(len(targets), -1).mean(axis=1)
    scores = example_scores(task, outputs, targets)
    if scores is None:
        return outputs.reshape(len(outputs), -1).mean(axis=1)
    return scores if task.direction == "max" else -scores


def _shuffled(arrays: Arrays, seed: int) -> Arrays:
    """Return arrays whose entries changed places, where an untrained network has other shapes."""
    generator = np.random.default_rng(seed)
    return {
        name: generator.permutation(array.reshape(-1)).reshape(array.shape)
        if array.ndim > 1
        else array
        for name, array in arrays.items()
    }


def _classes(task: Task, outputs: np.ndarray, cosines: np.ndarray) -> list[dict[str, Any]]:
    if not task.classifies or outputs.ndim != 2:
        return []
    # Here, as it takes a second that every other command would wait as well.
    from scipy.stats import mannwhitneyu

    found, rows, tests = outputs.argmax(axis=1), [], []
    known = np.isfinite(cosines)
    for label in np.unique(found[known]).tolist():
        own, others = cosines[known & (found == label)], cosines[known & (found != label)]
        if min(len(own), len(others)) < LEAST_OF_CLASS:
            continue
        tests.append(mannwhitneyu(own, others, alternative="less").pvalue)
        rows.append(
            {
                "class": str(label),
                "examples": len(own),
                "cosine": float(np.median(own)),
                "others": float(np.median(others)),
            }
        )
    adjusted = holm(np.array(tests)) if tests else []
    return [{**row, "p": float(p)} for row, p in zip(rows, adjusted, strict=True)]


def _shown(
    task: Task | None, inputs: Any, maps: list[np.ndarray], cosines: np.ndarray
) -> list[dict[str, Any]]:
    known = np.flatnonzero(np.isfinite(cosines))
    order = known[np.argsort(cosines[known], kind="stable")]
    chosen = np.unique(np.concatenate([order[: SHOWN // 2], order[len(order) - SHOWN // 2 :]]))
    return [
        {
            "cosine": float(cosines[index]),
            "input": np.round(np.asarray(inputs[index], float), 4).tolist(),
            "before": np.round(maps[0][index], 6).tolist(),
            "after": np.round(maps[1][index], 6).tolist(),
            "words": task.text_of(np.asarray(inputs[index])) if task else None,
        }
        for index in chosen.astype(int).tolist()
    ]
