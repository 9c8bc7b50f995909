"""Two networks under attack: projected gradient descent on each, and from the first carried over to the second."""

from __future__ import annotations

from typing import Any

import numpy as np

from karikomi.audit.corruptions.corruption import channel_axis
from karikomi.audit.predictions import score_of
from karikomi.tasks import Arrays, Runner, Split, Task

EPSILON = 2.0 / 255.0
STEPS = 20
MOST_EXAMPLES = 256


def attacked(
    task: Task,
    runner: Runner,
    pair: tuple[Arrays, Arrays],
    split: Split,
    *,
    seed: int,
    epsilon: float = EPSILON,
    steps: int = STEPS,
    most: int = MOST_EXAMPLES,
) -> dict[str, Any] | None:
    """Return the metric of both networks on inputs moved by at most `epsilon` of their range; None for integers.

    ``before``: the first network, attacked by its own gradients; ``after``: the second by its own; ``transfer``: the
    second on the inputs that were made for the first. Rounded weights can hide gradients, so that the lower of
    ``after`` and ``transfer`` counts (``worst``). ``clean_before`` and ``clean_after`` on the same examples. None for
    integers, and where a metric is not finite.

    Source: Madry et al. 2018, with a random start and steps of 2.5 epsilon / steps.
    """
    inputs = split.inputs
    if not isinstance(inputs, np.ndarray) or inputs.dtype.kind != "f":
        return None
    some = split.take(np.arange(min(len(split), most)))
    bounds = _bounds(inputs)
    made = [
        projected(runner, arrays, some, bounds, epsilon, steps, np.random.default_rng(seed))
        for arrays in pair
    ]

    def judged(arrays: Arrays, given: Any) -> float:
        return score_of(task, runner.outputs(arrays, given), some.targets)

    before, after = judged(pair[0], made[0]), judged(pair[1], made[1])
    transfer = judged(pair[1], made[0])
    clean = [judged(arrays, some.inputs) for arrays in pair]
    if not np.isfinite([before, after, transfer, *clean]).all():
        return None
    worse = min if task.direction == "max" else max
    return {
        "epsilon": epsilon,
        "steps": steps,
        "examples": len(some),
        "clean_before": clean[0],
        "clean_after": clean[1],
        "before": before,
        "after": after,
        "transfer": transfer,
        "worst": worse(after, transfer),
    }


def projected(
    runner: Runner,
    arrays: Arrays,
    split: Split,
    bounds: tuple[np.ndarray, np.ndarray],
    epsilon: float,
    steps: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Return inputs within `epsilon` of the range, at most, that raise the loss of a network."""
    clean = np.asarray(split.inputs)
    low, high = bounds
    radius = epsilon * (high - low)
    moved = clean + radius * generator.uniform(-1.0, 1.0, clean.shape)
    for _ in range(steps):
        moved = np.clip(moved, low, high).astype(clean.dtype)
        slope = runner.input_gradients(arrays, moved, split.targets)
        moved = moved + 2.5 * radius / steps * np.sign(slope)
        moved = np.clip(moved, clean - radius, clean + radius)
    return np.clip(moved, low, high).astype(clean.dtype)


def _bounds(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and largest value of each channel of images, of all entries of anything else."""
    axis = channel_axis(inputs)
    others = tuple(other for other in range(inputs.ndim) if other != axis)
    return inputs.min(axis=others, keepdims=True), inputs.max(axis=others, keepdims=True)
