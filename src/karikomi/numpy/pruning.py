"""Prune trees of weights held as NumPy arrays, and keep pruned weights at zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from karikomi import tree
from karikomi.numpy.arrays import Arrays, like, named
from karikomi.numpy.norms import check_arrays
from karikomi.prune import (
    Allocation,
    Coupled,
    Importances,
    Layout,
    Pattern,
    Score,
    as_score,
)
from karikomi.selection.array_arguments import check_masks, wide
from karikomi.selection.array_masks import Beside, masks_of_arrays, scores_of_arrays
from karikomi.selection.request import PruneRequest, request_of, scoring

WHERE = "numpy.prune"

Masks = dict[str, np.ndarray]


def prune(
    weights: Arrays,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    count: int | Mapping[str, int] | None = None,
    width: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    bytes: float | None = None,
    score: str | Score = "magnitude",
    allocation: Allocation | None = None,
    pattern: str | Pattern = "unstructured",
    rounding: str = "up",
    importance: Mapping[str, Any] | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    coupled: Sequence[Coupled] | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
) -> tuple[Arrays, Masks]:
    """Return ``(weights with the least important at zero, masks)``; the input is left alone.

    Scores are compared in float32; of each pool of the allocation exactly the asked number goes, ties by
    the order of the arrays, then of their entries. A mask is true where a weight is kept; arrays
    that were not selected have none.

    `weights`: any tree of dicts, lists, tuples and named tuples of floating arrays, also of the bfloat16 and
    float8 of ``ml_dtypes``. One target, unless the pattern determines how much is removed: `sparsity`, the share of all
    selected weights that is zero afterwards, in [0, 1), or globs over names -> such a share, each layer by
    hand; of units or blocks as many go as make it at least that share, or with ``rounding="nearest"`` nearest to
    it; `count`, how many weights (units, heads, layers, blocks) are zero afterwards, or globs -> such numbers;
    `width`, the share of units (heads, layers, blocks) that stays; or a budget for what stays, as a share of the
    selected arrays or a whole number: `parameters`, `macs`, `bytes`. `score`, `allocation`,
    `pattern`: registered names (``karikomi list``) or objects, but no score that reconstructs what stays;
    without an `allocation` it is ``uniform`` for units, blocks and scores that compare within rows
    (``wanda``), else ``global``.
    `facts`: what the score needs beside the weights, fact (`karikomi.prune.FACTS`, or a score's own) -> name
    -> array; ``outliers``, ``curve`` and ``macs`` (of a whole array, per example) -> name -> value.
    `importance`: name -> array, a score of your own instead of `score`; arrays without one have no mask.
    `layouts`: name -> which axes are units and inputs, for patterns and scores that depend on them: they are
    never guessed from rank. `coupled`: groups, if units or heads span several arrays. `only`,
    `exclude`: globs over the names of arrays (default: all of them, biases too). `masks`: earlier masks
    by name; what they removed stays removed and counts.

    Raises `InvalidArgument` for a tree, target or mask that is invalid or does not fit, `UnknownName` for a name
    or glob, `Unsupported` for combinations that are not defined and float64 weights outside of float32's range,
    `NonFinite` naming an array.

    >>> import numpy as np
    >>> layers = [{"weight": np.array([[3.0, -1.0, 2.0, -4.0]]), "bias": np.zeros(1)}]
    >>> pruned, masks = prune(layers, sparsity=0.5, only="*weight")
    >>> pruned[0]["weight"].tolist(), masks["0.weight"].tolist()
    ([[3.0, 0.0, 0.0, -4.0]], [[True, False, False, True]])

    Source: Han et al. 2015 (magnitude); Frankle and Carbin 2019 (global).
    """
    request = request_of(
        WHERE,
        sparsity=sparsity,
        count=count,
        width=width,
        parameters=parameters,
        macs=macs,
        bytes=bytes,
        score=score,
        allocation=allocation,
        pattern=pattern,
        rounding=rounding,
        importance=importance,
        facts=facts,
        only=only,
        exclude=exclude,
    )
    return pruned(weights, request, Beside(layouts, coupled, masks))


def scores(
    weights: Iterable[Any],
    *,
    score: str | Score = "magnitude",
    pattern: str | Pattern | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    coupled: Sequence[Coupled] | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
) -> Importances:
    """Return what the weights are worth by a score, by name: the numbers by which `prune` ranks, in float32.

    Of single weights arrays of their shapes, which ``prune(..., importance=scores)`` takes; with a `pattern` of units
    or blocks one number per item. `print` shows a table with histograms. The other arguments, and what is raised, are
    those of `prune`.

    >>> import numpy as np
    >>> scores({"w": np.array([3.0, -1.0])})["w"].tolist()
    [3.0, 1.0]

    Source: of the formulas, the scores.
    """
    where, chosen = "numpy.scores", as_score(score)
    request = scoring(where, chosen, pattern, facts=facts, only=only, exclude=exclude)
    arrays = named(tree.collected(weights), where=where)
    found = scores_of_arrays(arrays, request, Beside(layouts, coupled, masks))
    return Importances(found, score=type(chosen).__name__.lower())


def pruned(weights: Arrays, request: PruneRequest, beside: Beside) -> tuple[Arrays, Masks]:
    """Return ``(weights with the least important at zero, masks)`` for a validated request."""
    weights = tree.collected(weights)
    kept = masks_of_arrays(named(weights, where=request.where), request, beside)
    return masked(weights, kept), kept


def masked(weights: Arrays, masks: Mapping[str, np.ndarray]) -> Arrays:
    """Return weights, or gradients, with exactly ``+0.0`` wherever a mask is false; the input is left alone.

    `masks`: what `prune` returned; arrays without a mask, and ``None``, stay as they are. Raises
    `UnknownName` for a mask without its array, `InvalidArgument` for one that does not fit.

    >>> import numpy as np
    >>> masked([np.array([1.0, 2.0])], {"0": np.array([True, False])})
    [array([1., 0.])]
    """
    weights = tree.collected(weights)
    found = named(weights, where="numpy.masked")
    check_masks(masks, found, where="numpy.masked", leaf="array")
    for name, mask in masks.items():
        if found[name] is not None:
            check_arrays({name: wide(found[name])}, where="numpy.masked")
            found[name] = np.where(mask, found[name], found[name].dtype.type(0))
    return like(weights, found, where="numpy.masked")
