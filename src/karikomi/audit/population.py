"""Which changed predictions are chance: the same audit over many small networks that could as well have been made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from karikomi.audit.predictions import score_of
from karikomi.tasks import Arrays, Runner, Split, Task

LISTED = 20
LEAST_EXEMPLARS = 10
"""Networks on each side from which on an example may be called compression-identified."""


def redrawn(before: Arrays, after: Arrays, *, seed: Any) -> Arrays | str:
    """Return weights that a rounding with other luck would have left, or the reason why there are none.

    ``w' = w + s (w_small - w)`` with s = -1 or 1 by a coin for each weight: errors as large as before, at the same
    places. Zeros stay where they are, and vectors (biases, statistics) as they are in the small network. It fits
    rounding to nearest values; what was trained or compensated afterwards depends on its errors (`population` then says
    how much worse the draws are than the file).

    `before`, `after`: arrays of the same shapes. `seed`: of the coins, one or several numbers >= 0.

    >>> made = redrawn({"w": np.array([[1.0, 2.0]])}, {"w": np.array([[1.25, 0.0]])}, seed=0)
    >>> float(made["w"][0, 0]) in (0.75, 1.25), float(made["w"][0, 1])
    (True, 0.0)

    Source: the wild bootstrap, Liu 1988, with the coins of Davidson and Flachaire 2008; deviation: of weights.
    """
    generator = np.random.default_rng(seed)
    made, moved = dict(after), 0
    for name, small in after.items():
        if name not in before or before[name].shape != small.shape:
            return f"{name} has another shape than before: what was shrunk was not drawn"
        if not _holds_errors(small):
            continue
        wide = before[name].astype(np.float64)
        error = np.where(small == 0, 0.0, small.astype(np.float64) - wide)
        moved += int(np.count_nonzero(error))
        drawn = wide + np.where(generator.random(small.shape) < 0.5, -error, error)
        made[name] = np.where(small == 0, 0.0, drawn).astype(small.dtype)
    return made if moved else "no weight that is left was rounded"


def population(
    task: Task,
    runner: Runner,
    split: Split,
    outputs: tuple[np.ndarray, np.ndarray],
    *,
    smaller: Sequence[Arrays],
    originals: Sequence[Arrays] = (),
    drawn: bool = False,
) -> dict[str, Any]:
    """Return how the predictions vary over a population of small networks, and over one of originals if there is one.

    `outputs`: of the two networks of the audit, on `split`. `smaller`: further small networks; with `drawn` their
    weights came from `redrawn` and the file's own network is not one of them. `originals`: further networks before.

    ``drop`` and ``churn``: mean, min and max over the population, against the original's predictions (the commonest,
    for several); ``between``: the share of differing predictions of two networks of the population, which is chance
    alone; ``in_all``, ``in_some``: examples whose prediction changed in all, or in some; ``of_file_in_all``: those of
    the file's own changes that all share; ``examples``: up to 20 that changed in all, lost ones first. ``word``: what
    these may be called, by the number of networks on both sides.

    Source: Hooker et al. 2019 (exemplars by the commonest label over a population); deviation: below ten networks
    on both sides the word is flips.
    """
    few = [runner.outputs(arrays, split.inputs) for arrays in smaller]
    if not drawn:
        few.insert(0, outputs[1])
    large = [outputs[0], *(runner.outputs(arrays, split.inputs) for arrays in originals)]
    whole = float(np.mean([score_of(task, output, split.targets) for output in large]))
    drops = [task.drop(whole, score_of(task, output, split.targets)) for output in few]
    found: dict[str, Any] = {
        "drawn": drawn,
        "before": len(large),
        "after": len(few),
        "word": "exemplars" if min(len(few), len(large)) >= LEAST_EXEMPLARS else "flips",
        "drop": _spread(drops),
        "drop_of_file": task.drop(whole, score_of(task, outputs[1], split.targets)),
    }
    if not task.classifies:
        return found
    return {**found, **_labels(task, split, outputs[1], large, few)}


def _holds_errors(array: np.ndarray) -> bool:
    # By name: the bfloat16 and float8 of ml_dtypes are of no kind of NumPy's.
    return "float" in array.dtype.name and array.ndim >= 2


def _labels(
    task: Task,
    split: Split,
    file: np.ndarray,
    large: Sequence[np.ndarray],
    few: Sequence[np.ndarray],
) -> dict[str, Any]:
    _, counts = task.predictions(file, split.targets)
    true = split.targets[counts]
    said = [task.predictions(output, split.targets)[0][counts] for output in (*large, *few, file)]
    first, small = commonest(np.stack(said[: len(large)])), np.stack(said[len(large) : -1])
    usual, changed, of_file = commonest(small), small != first, said[-1] != first
    everywhere = changed.all(axis=0)
    lost = everywhere & (first == true)
    order = np.concatenate([np.flatnonzero(lost), np.flatnonzero(everywhere & ~lost)])
    places = np.flatnonzero(counts)
    return {
        "examples_judged": len(true),
        "churn": _spread(changed.mean(axis=1).tolist()),
        "between": _between(small),
        "in_all": int(everywhere.sum()),
        "lost_in_all": int(lost.sum()),
        "in_some": int(changed.any(axis=0).sum()),
        "of_file": int(of_file.sum()),
        "of_file_in_all": int((of_file & everywhere).sum()),
        "examples": [
            {
                "index": int(places[k]),
                "label": str(true[k]),
                "before": str(first[k]),
                "after": str(usual[k]),
                "share": float(np.mean(small[:, k] == usual[k])),
            }
            for k in order[:LISTED].tolist()
        ],
    }


def commonest(labels: np.ndarray) -> np.ndarray:
    """Return the commonest label of each example; of several the smallest.

    `labels`: integers (networks, examples).

    >>> commonest(np.array([[1, 2, 3], [1, 3, 2], [0, 3, 1]])).tolist()
    [1, 3, 1]
    """
    ranked = np.sort(labels, axis=0)
    usual, longest = ranked[0].copy(), np.ones(ranked.shape[1], int)
    for place, runs in enumerate(_runs(ranked)):
        better = runs > longest
        usual[better], longest[better] = ranked[place][better], runs[better]
    return usual


def _runs(ranked: np.ndarray) -> Iterator[np.ndarray]:
    """Yield for each row of sorted labels how many equal ones stand above it, itself included."""
    runs = np.ones(ranked.shape[1], int)
    yield runs
    for above, row in pairwise(ranked):
        runs = np.where(row == above, runs + 1, 1)
        yield runs


def _between(labels: np.ndarray) -> float | None:
    """Return the share of examples that two different networks predict differently, over all pairs."""
    count = len(labels)
    if count < 2:
        return None
    same = sum(int(np.sum(runs - 1)) for runs in _runs(np.sort(labels, axis=0)))
    return 1.0 - 2 * same / (count * (count - 1) * labels.shape[1])


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}


def population_of(
    task: Task,
    runner: Runner,
    pair: tuple[Arrays, Arrays],
    split: Split,
    outputs: tuple[np.ndarray, np.ndarray],
    seed: int,
    count: int,
    files: tuple[Sequence[Arrays], Sequence[Arrays]],
) -> dict[str, Any] | str | None:
    """Return `population` of `count` drawn networks, or of those in `files` (small ones, originals); or why not."""
    if not count and not files[0]:
        return None if not files[1] else "originals without replicates of the small network"
    if any(math.isnan(score_of(task, output, split.targets)) for output in outputs):
        return "the metric is not finite"
    made: list[Arrays] = list(files[0])
    for number in range(count):
        drawn = redrawn(*pair, seed=[seed, number])
        if isinstance(drawn, str):
            return drawn
        made.append(drawn)
    return population(
        task, runner, split, outputs, smaller=made, originals=files[1], drawn=bool(count)
    )
