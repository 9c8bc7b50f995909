"""Scores of the weights or units of a model, without pruning it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from karikomi.keras.pruning.masks import Masks
from karikomi.keras.pruning.request import ModelRequest
from karikomi.prune import Importances, Pattern, Score, as_score
from karikomi.prune.facts import Facts
from karikomi.selection.request import scoring


def scores(
    model: Any,
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
    """Return what the weights of a model are worth by a score, by path, and leave the model as it is.

    The numbers by which `prune_` ranks: float32 arrays of the variables' shapes, or with a `pattern` of units, heads,
    layers or blocks one per item. `print` shows a table with histograms, ``prune_(model, 0.5, importance=scores)``
    prunes by them. The arguments, and what is raised, are those of `prune_`; by default single weights, of scores of
    units the units.

    >>> import keras
    >>> head = keras.layers.Dense(1, name="head")
    >>> model = keras.Sequential([keras.Input((2,)), head], name="net")
    >>> head.kernel.assign([[3.0], [-1.0]]) is None or True
    True
    >>> scores(model)["net/head/kernel"].tolist()
    [[3.0], [1.0]]

    Source: of the formulas, the scores.
    """
    chosen = as_score(score)
    request = scoring(
        "keras.scores",
        chosen,
        pattern,
        facts=facts,
        only=only,
        exclude=exclude,
        protect=protect,
    )
    model_request = ModelRequest(model=model, request=request, data=data, loss=loss)
    found, left_alone = model_request.scores(masks or Masks())
    return Importances(found, score=type(chosen).__name__.lower(), left_alone=left_alone)
