"""Where damage sits: the alignment of each layer's outputs, and what each layer of the second network costs alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from karikomi.audit.predictions import score_of
from karikomi.audit.representation import alignment
from karikomi.tasks import Arrays, Runner, Split, Task

MOST_EXAMPLES = 512
MOST_FEATURES = 16_384
BATCH = 128


def layer_rows(
    task: Task,
    runner: Runner,
    pair: tuple[Arrays, Arrays],
    split: Split,
    *,
    most: int = MOST_EXAMPLES,
) -> list[dict[str, Any]]:
    """Return one row per layer that both networks have, in the order of the forward pass.

    ``cka``: the alignment of its outputs in both; None where they do not vary. ``alone``: the drop of the metric if the
    first network gets this layer of the second, and nothing else; None where the layer has another shape there.
    """
    some = split.take(np.arange(min(len(split), most)))
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for start in range(0, len(some), BATCH):
        part = some.take(np.arange(start, min(start + BATCH, len(some))))
        first, second = (runner.layer_outputs(arrays, part.inputs) for arrays in pair)
        for name in first:
            if name in second and len(first[name]) == len(part) == len(second[name]):
                pairs = found.setdefault(name, [])
                pairs.append((_thinned(first[name]), _thinned(second[name])))
    alone = _alone(task, runner, pair, some, list(found))
    rows = []
    for name, pairs in found.items():
        value = alignment(pairs)
        cka = value if math.isfinite(value) else None
        rows.append({"layer": name, "cka": cka, "alone": alone.get(name)})
    return rows


def _alone(
    task: Task, runner: Runner, pair: tuple[Arrays, Arrays], some: Split, layers: list[str]
) -> dict[str, float]:
    before, after = pair
    whole = score_of(task, runner.outputs(before, some.inputs), some.targets)
    drops = {}
    for layer in layers:
        own = [name for name in before if name.rpartition(".")[0] == layer]
        if not all(name in after and after[name].shape == before[name].shape for name in own):
            continue
        outputs = runner.outputs({**before, **{name: after[name] for name in own}}, some.inputs)
        drop = task.drop(whole, score_of(task, outputs, some.targets))
        if math.isfinite(drop):
            drops[layer] = float(drop)
    return drops


def _thinned(values: np.ndarray) -> np.ndarray:
    """Return the features of each example, evenly thinned where there are very many."""
    flat = values.reshape(len(values), -1)
    step = -(-flat.shape[1] // MOST_FEATURES)
    return flat[:, ::step]
