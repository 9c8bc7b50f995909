"""Scores of the weights or units of a module, without pruning it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.prune import Importances, Pattern, Score, as_score
from karikomi.prune.facts import Facts
from karikomi.selection.exact_masks import find_scores
from karikomi.selection.request import scoring
from karikomi.torch.pruning.in_place import prepared
from karikomi.torch.pruning.masks import Masks
from karikomi.torch.tracing.isolation import isolated

WHERE = "torch.scores"


def scores(
    module: nn.Module,
    *,
    score: str | Score = "magnitude",
    pattern: str | Pattern | None = None,
    data: Iterable[Any] | None = None,
    loss: Any = None,
    facts: Facts | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    protect: Collection[str] | None = None,
    masks: Masks | None = None,
) -> Importances:
    """Return what the weights of a module are worth by a score, by name, and leave the module as it is.

    The numbers by which `prune_` ranks: float32 tensors of the weights' shapes, or with a `pattern` of units, heads,
    layers or blocks one per item. ``print(scores)`` shows a table with the histogram of each tensor,
    ``prune_(module, 0.5, importance=scores)`` prunes by them, also after they were changed.

    `score`, `pattern`, `data`, `loss`, `facts`, `only`, `exclude`, `protect`: as in `prune_`; by default single
    weights, of scores of units the units. `masks`: what they removed scores 0. Scores that `prune_` measures in rounds
    (``synflow``) are those of the first. Raises what `prune_` raises, and `Unsupported` for scores that reconstruct.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> layer.weight.data = torch.tensor([[3.0, -1.0], [0.5, 2.0]])
    >>> scores(layer)["weight"].tolist()
    [[3.0, 1.0], [0.5, 2.0]]
    >>> scores(layer, score="l2", pattern="units", protect=())["weight"].round(decimals=3).tolist()
    [3.1619999408721924, 2.062000036239624]

    Source: of the formulas, the scores.
    """
    chosen = as_score(score)
    request = scoring(
        WHERE, chosen, pattern, facts=facts, only=only, exclude=exclude, protect=protect
    )
    pruning, left_alone = prepared(module, request, data, loss)
    with isolated(0, 0):
        selection, others = pruning.selection(request, Masks(masks))
        found = find_scores(selection)
    left_alone = {n: why for n, why in {**left_alone, **others}.items() if n not in found}
    devices = {name: weight.device for name, weight in pruning.weights.items()}

    return Importances(
        found,
        score=type(chosen).__name__.lower(),
        left_alone=left_alone,
        as_array=partial(_as_tensor, devices),
    )


def _as_tensor(devices: Mapping[str, torch.device], values: np.ndarray, name: str) -> torch.Tensor:
    return torch.from_numpy(values).to(devices.get(name, "cpu"))
