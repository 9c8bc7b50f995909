"""Two networks under corrupted inputs: the drop by corruption and severity, and which one hurts too much."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from karikomi.audit.corruptions import Corruption, corruptions_of, modality_of
from karikomi.audit.corruptions.corruption import SEVERITIES, channel_axis
from karikomi.audit.corruptions.disturbed_input import disturbed_input
from karikomi.audit.paired.mean_tests import rise_p
from karikomi.audit.paired.paired_outcomes import holm
from karikomi.audit.predictions import score_of
from karikomi.tasks import Arrays, Runner, Split, Task
from karikomi.tasks.example_scores import example_scores

MOST_EXAMPLES = 2_000
"""Examples, from the start of the split; each is evaluated 50 times by both networks."""

BLOCK = 500


def under_corruptions(
    task: Task,
    runner: Runner,
    pair: tuple[Arrays, Arrays],
    split: Split,
    *,
    seed: int,
    modality: str | None = None,
    most: int = MOST_EXAMPLES,
) -> dict[str, Any] | None:
    """Return the metric of both networks under each corruption; None for inputs that have none.

    ``rows``: name, the metric of each severity before and after, the mean ``drop``; ``relative``, the errors of the
    second network by those of the first, summed over severities, without clean errors as in mCE; ``p``, adjusted by
    Holm over corruptions: is the drop under this corruption larger than the drop on clean inputs? The same random
    numbers are used for both networks. ``examples``, ``modality``. Of inputs of several arrays the only one that can be
    corrupted is (the tokens beside their mask); None where there are more.

    Source: Hendrycks and Dietterich 2019; deviation: normalised by the network before instead of AlexNet.
    """
    some = split.take(np.arange(min(len(split), most)))
    given = disturbed_input(some.inputs, modality)
    kind = modality or (modality_of(given.array) if given else None)
    if kind is None or given is None:
        return None
    clean = [runner.outputs(arrays, some.inputs) for arrays in pair]
    ordinary = _differences(task, clean, some.targets)
    rows, tests = [], []
    for number, (name, corruption) in enumerate(corruptions_of(kind).items()):
        found: list[list[float | None]] = [[], []]
        extra = []
        for severity in SEVERITIES:
            made = corrupted(corruption, given.array, severity, kind, seed=[seed, number])
            outputs = [runner.outputs(arrays, given.replaced(made)) for arrays in pair]
            for own, output in zip(found, outputs, strict=True):
                score = score_of(task, output, some.targets)
                own.append(float(score) if math.isfinite(score) else None)
            extra.append(_differences(task, outputs, some.targets))
        rows.append(
            {"corruption": name, "before": found[0], "after": found[1], **_totals(task, found)}
        )
        known = ordinary is not None and all(part is not None for part in extra)
        tests.append(rise_p(np.mean(extra, axis=0) - ordinary) if known else math.nan)  # type: ignore[arg-type, operator]
    tested = not any(map(math.isnan, tests))
    for row, p in zip(rows, holm(np.array(tests)) if tested else tests, strict=True):
        row["p"] = float(p) if tested else None
    return {"modality": kind, "examples": len(some), "rows": rows}


def corrupted(
    corruption: Corruption,
    inputs: np.ndarray,
    severity: int,
    modality: str,
    *,
    seed: Any,
) -> np.ndarray:
    """Return corrupted inputs of the same type and scale.

    Images are brought to [0, 1] by the smallest and largest value of each channel, signals to deviation 1, and back.
    """
    if modality == "tokens":
        return corruption.corrupt(inputs, severity, np.random.default_rng(seed))
    if modality == "signal":
        scale = float(inputs.std(dtype=np.float64)) or 1.0
        made = corruption.corrupt(
            inputs.astype(np.float64) / scale, severity, np.random.default_rng(seed)
        )
        return (made * scale).astype(inputs.dtype)
    axis = channel_axis(inputs)
    axis = 1 if axis is None else axis
    others = tuple(other for other in range(4) if other != axis)
    low = inputs.min(axis=others, keepdims=True)
    if inputs.dtype.kind == "u":
        low = low.astype(np.float64)
    spread = np.maximum(inputs.max(axis=others, keepdims=True) - low, 1e-12)
    out = np.empty_like(inputs)
    for number, part in enumerate(_blocks(len(inputs))):
        unit = np.moveaxis((inputs[part] - low) / spread, axis, 3).astype(np.float64)
        made = corruption.corrupt(unit, severity, np.random.default_rng([*np.ravel(seed), number]))
        scaled = np.moveaxis(made, 3, axis) * spread + low
        if inputs.dtype.kind == "u":
            scaled = np.rint(np.clip(scaled, low, low + spread))
        out[part] = scaled.astype(inputs.dtype)
    return out


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, BLOCK):
        yield slice(start, start + BLOCK)


def _differences(task: Task, outputs: list[np.ndarray], targets: np.ndarray) -> np.ndarray | None:
    """Return by how much each example got worse; None for a metric function, which would be called too often."""
    if not task.classifies and task.error is None:
        return None
    before, after = (example_scores(task, output, targets) for output in outputs)
    if before is None or after is None:
        return None
    return before - after if task.direction == "max" else after - before


def _totals(task: Task, found: list[list[float | None]]) -> dict[str, float | None]:
    if any(value is None for own in found for value in own):
        return {"drop": None, "relative": None}
    before, after = (np.array(own, float) for own in found)
    drops = [task.drop(b, a) for b, a in zip(before.tolist(), after.tolist(), strict=True)]
    errors = (1.0 - before.sum() / 5, 1.0 - after.sum() / 5) if task.classifies else (0.0, 0.0)
    relative = float(errors[1] / errors[0]) if errors[0] > 0 else None
    return {"drop": float(np.mean(drops)), "relative": relative}
