"""Robustness of two networks: the metric under input noise, and agreement of input gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from karikomi.audit.predictions import score_of
from karikomi.tasks import Arrays, Runner, Split, Task

SIGMAS = (0.0, 0.1, 0.2, 0.4)
"""Standard deviations of the noise, as shares of that of the inputs."""

MOST_GRADIENTS = 512
"""Number of examples, from the start of the split, for the comparison of input gradients."""


def under_noise(
    task: Task, runner: Runner, pair: tuple[Arrays, Arrays], split: Split, *, seed: int
) -> list[dict[str, Any]]:
    """Return the metric of both networks under the same Gaussian noise, one row per strength.

    One draw is used for all strengths and both networks, so that rows differ by strength alone. Empty
    for inputs that are not one array of floats: noise on indices is not defined.
    """
    if not isinstance(split.inputs, np.ndarray) or split.inputs.dtype.kind != "f":
        return []
    noise = np.random.default_rng(seed).standard_normal(split.inputs.shape, dtype=np.float32)
    noise *= np.float32(np.std(split.inputs, dtype=np.float64))
    rows = []
    for sigma in SIGMAS:
        inputs = (split.inputs + np.float32(sigma) * noise).astype(split.inputs.dtype)
        scores = [score_of(task, runner.outputs(arrays, inputs), split.targets) for arrays in pair]
        before, after = (score if math.isfinite(score) else None for score in scores)
        rows.append({"sigma": sigma, "before": before, "after": after})
    return rows


def gradient_agreement(
    runner: Runner, pair: tuple[Arrays, Arrays], split: Split
) -> dict[str, Any] | None:
    """Return the agreement of the gradients of the loss by the input, or None for integer inputs.

    The cosine of both networks' gradients for each example. An example with a gradient that is zero
    or not finite in either network has no cosine: it is left out and counted (``zero_gradients``,
    ``nonfinite_gradients``). Without any cosine the three figures are None.
    """
    inputs = split.inputs
    if not isinstance(inputs, np.ndarray) or inputs.dtype.kind != "f":
        return None
    some = split.take(np.arange(min(len(split), MOST_GRADIENTS)))
    before, after = (
        runner.input_gradients(arrays, inputs[: len(some)], some.targets).reshape(len(some), -1)
        for arrays in pair
    )
    finite = np.isfinite(before).all(axis=1) & np.isfinite(after).all(axis=1)
    nonzero = before.any(axis=1) & after.any(axis=1)
    cosines = np.sum(_unit(before[finite & nonzero]) * _unit(after[finite & nonzero]), axis=1)
    known = len(cosines) > 0
    return {
        "mean_cosine": float(np.mean(cosines)) if known else None,
        "median_cosine": float(np.median(cosines)) if known else None,
        "share_above_0.9": float(np.mean(cosines > 0.9)) if known else None,
        "examples": len(some),
        "zero_gradients": int(np.sum(finite & ~nonzero)),
        "nonfinite_gradients": int(np.sum(~finite)),
    }


def _unit(rows: np.ndarray) -> np.ndarray:
    # By the largest entry first: squares of a confident network's gradients underflow.
    wide = rows.astype(np.float64)
    wide /= np.max(np.abs(wide), axis=1, keepdims=True, initial=0.0)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)
