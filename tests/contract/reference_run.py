"""A small training worked out in plain NumPy, step by step: what the pairs of features are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from contract.pairs import Run

Arrays = dict[str, np.ndarray]
Memory = dict[str, Any]
Clip = Callable[[Arrays, float, Memory], "tuple[Arrays, bool, Memory]"]
"""``(gradients, limit, memory) -> (gradients, whether to skip, memory if the step is taken)``."""


@dataclass
class Trace:
    """The weights after each update, what was done in each, and how often an error was raised."""

    weights: list[Arrays] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    raised: int = 0


def joint(grads: Arrays) -> float:
    """Return the norm of all arrays together."""
    return math.sqrt(sum(float(np.square(array).sum()) for array in grads.values()))


def scaled(grads: Arrays, factor: float) -> Arrays:
    """Return all arrays times a number."""
    return {name: factor * array for name, array in grads.items()}


def by_value(grads: Arrays, limit: float, memory: Memory) -> tuple[Arrays, bool, Memory]:
    """Clamp each entry."""
    return {n: np.clip(array, -limit, limit) for n, array in grads.items()}, False, memory


def by_norm(grads: Arrays, limit: float, memory: Memory) -> tuple[Arrays, bool, Memory]:
    """Scale the joint norm down to the limit."""
    return scaled(grads, min(1.0, limit / joint(grads))), False, memory


def by_tensor(grads: Arrays, limit: float, memory: Memory) -> tuple[Arrays, bool, Memory]:
    """Scale the norm of each array down to the limit."""
    sizes = {name: joint({name: array}) for name, array in grads.items()}
    found = {n: array * min(1.0, limit / (sizes[n] or 1.0)) for n, array in grads.items()}
    return found, False, memory


def by_mean(grads: Arrays, ratio: float, memory: Memory) -> tuple[Arrays, bool, Memory]:
    """Scale the joint norm down to a multiple of its running mean, which has a weight of a half."""
    mean, weight = memory.get("mean", (0.0, 0.0))
    size = joint(grads)
    limit = ratio * mean / weight if weight else math.inf
    kept = min(size, limit)
    after = {**memory, "mean": (0.5 * mean + 0.5 * kept, 0.5 * weight + 0.5)}
    return scaled(grads, kept / size), False, after


def by_second_moments(grads: Arrays, most: float, memory: Memory) -> tuple[Arrays, bool, Memory]:
    """Clamp each entry to a multiple of the root of its running mean square, if that is known."""
    found = {}
    for name, array in grads.items():
        limits = np.sqrt(most * memory.get("squares", {}).get(name, np.zeros_like(array)))
        limits = np.where(limits > 0, limits, math.inf)
        found[name] = np.clip(array, -limits, limits)
    return found, False, {**memory, "follow": True}


def by_spikes(grads: Arrays, sigma: float, memory: Memory) -> tuple[Arrays, bool, Memory]:
    """Skip a step far above the last three norms, but not two steps in a row."""
    ring, size = memory.get("ring", []), joint(grads)
    skip = False
    if len(ring) >= 2 and memory.get("in a row", 0) < 1:
        skip = size > np.mean(ring) + sigma * np.std(ring, ddof=1)
    return grads, bool(skip), {**memory, "ring": [*ring, size][-3:]}


def trace_of(run: Run) -> Trace:
    """Return what a run does."""
    from contract.pairs import MASKS, WEIGHTS

    trace, memory, attempted = Trace(), Memory(), 0
    weights = {name: array.copy() for name, array in WEIGHTS.items()}
    if run.masks:
        weights = {name: array * MASKS[name] for name, array in weights.items()}
    speed = {name: np.zeros_like(array) for name, array in weights.items()}
    for first in range(0, run.batches, run.every):
        window = [run.slopes(batch) for batch in range(first, first + run.every)]
        grads = {name: sum(one[name] for one in window) / run.every for name in weights}
        if run.penalty is not None:
            grads = {n: g + run.penalty * np.sign(weights[n]) for n, g in grads.items()}
        if run.masks:
            grads = {name: np.where(MASKS[name], g, 0.0) for name, g in grads.items()}
        bad = [name for name, array in grads.items() if not np.isfinite(array).all()]
        if bad and run.policy == "raise":
            trace.raised += 1
            trace.skipped.append(True)
            trace.weights.append(weights)
            continue
        grads = {n: np.zeros_like(g) if n in bad else g for n, g in grads.items()}
        clipped, skip, after = _clipped(run, grads, attempted, memory)
        attempted += 1
        if bad and run.policy == "skip":
            skip = True
        elif not bad:
            memory = {**memory, "in a row": memory.get("in a row", 0) + 1 if skip else 0}
        if not skip:
            memory = {**after, "in a row": memory.get("in a row", 0)}
            if memory.get("follow") and not bad:
                memory["squares"] = _followed(memory.get("squares", {}), clipped)
            speed = {name: run.momentum * speed[name] + g for name, g in clipped.items()}
            weights = {name: array - run.rate * speed[name] for name, array in weights.items()}
        if run.bound is not None:
            weights = {n: np.clip(array, -run.bound, run.bound) for n, array in weights.items()}
        trace.skipped.append(skip)
        trace.weights.append(weights)
    return trace


def _clipped(
    run: Run, grads: Arrays, attempted: int, memory: Memory
) -> tuple[Arrays, bool, Memory]:
    concerned = {n: g for n, g in grads.items() if not run.grouped or n.startswith("one.")}
    others = {name: g for name, g in grads.items() if name not in concerned}
    skip, after = False, memory
    for clip, limit in run.limits(attempted):
        concerned, now, after = clip(concerned, limit, after)
        skip = skip or now
    return concerned | others, skip, after


def _followed(squares: Arrays, grads: Arrays) -> Arrays:
    found = {}
    for name, array in grads.items():
        found[name] = 0.999 * squares.get(name, np.zeros_like(array)) + 0.001 * array**2
    return found
