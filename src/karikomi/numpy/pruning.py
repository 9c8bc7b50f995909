"""Prune trees of weights held as NumPy arrays, and keep pruned weights at zero.

The selection is the one of all frameworks (`karikomi.selection.exact_masks`); here facts are given, not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from karikomi import tree
from karikomi.errors import InvalidArgument, UnknownName, Unsupported, suggest
from karikomi.numpy.arrays import Arrays, like, named
from karikomi.numpy.checks import (
    OF_TENSORS,
    WHERE,
    check_coupled,
    check_facts,
    check_layouts,
    check_masks_alone,
    wide,
)
from karikomi.numpy.norms import check_arrays
from karikomi.prune import (
    Coupled,
    Layers,
    Layout,
    Member,
    Pattern,
    Score,
    Units,
    as_pattern,
    as_score,
)
from karikomi.select import select
from karikomi.selection.arguments import allocation_of, asked, by_hand
from karikomi.selection.exact_masks import SelectionRequest, find_masks
from karikomi.selection.weight_source import Source, source_of

Masks = dict[str, np.ndarray]


def prune(
    weights: Arrays,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    width: float | None = None,
    parameters: float | None = None,
    macs: float | None = None,
    bytes: float | None = None,
    score: str | Score = "magnitude",
    allocation: str | None = None,
    pattern: str | Pattern = "unstructured",
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
    float8 of ``ml_dtypes``. One target, unless the pattern says how much goes: `sparsity`, the share of all
    selected weights that is zero afterwards, in [0, 1), or globs over names -> such a share, each layer by
    hand; `width`, the share of units (heads, layers, blocks) that stays; or a budget for what stays, as a
    share of the selected arrays or a whole number: `parameters`, `macs`, `bytes`. `score`, `allocation`,
    `pattern`: registered names (``karikomi list``) or objects, but no score that reconstructs what stays;
    without an `allocation` it is ``uniform`` for units, blocks and scores that compare within rows
    (``wanda``), else ``global``.
    `facts`: what the score needs beside the weights, fact (`karikomi.prune.FACTS`, or a score's own) -> name
    -> array; also ``outliers`` and ``curve`` for allocations and ``macs`` (of a whole array, per example).
    `layouts`: name -> which axes are units and inputs, for patterns and scores that speak of them: no rank
    tells. `coupled`: what goes together, if units or heads span several arrays. `only`,
    `exclude`: globs over the names of arrays (default: all of them, biases too). `masks`: earlier masks
    by name; what they removed stays removed and counts.

    Raises `InvalidArgument` for what is no such tree or target or does not fit, `UnknownName` for a name
    or glob, `Unsupported` for combinations that mean nothing and float64 weights that float32 does not hold,
    `NonFinite` naming an array.

    >>> import numpy as np
    >>> layers = [{"weight": np.array([[3.0, -1.0, 2.0, -4.0]]), "bias": np.zeros(1)}]
    >>> pruned, masks = prune(layers, sparsity=0.5, only="*weight")
    >>> pruned[0]["weight"].tolist(), masks["0.weight"].tolist()
    ([[3.0, 0.0, 0.0, -4.0]], [[True, False, False, True]])

    Source: Han et al. 2015 (magnitude); Frankle and Carbin 2019 (global).
    """
    asked_score, chosen = as_score(score), as_pattern(pattern)
    check_masks_alone(asked_score)
    weights = tree.collected(weights)
    found = named(weights, where=WHERE)
    names = select(found, only=only, exclude=exclude, where=WHERE)
    for name in names:
        _check_real(name, found[name])
    earlier = _fitting({} if masks is None else masks, found, where=WHERE)
    hand = by_hand(sparsity, names, allocation, where=WHERE)
    names = [name for name in names if name in hand] if hand else names
    chosen_arrays = {name: found[name] for name in names}
    sources = _sources(chosen_arrays, facts or {}, layouts or {}, asked_score)
    question = SelectionRequest(
        sources=sources,
        score=asked_score,
        pattern=chosen,
        allocation=allocation_of(allocation, chosen, asked_score),
        target=asked(
            *(chosen, WHERE),
            sparsity=0.0 if isinstance(sparsity, Mapping) else sparsity,
            width=width,
            parameters=parameters,
            macs=macs,
            bytes=bytes,
        ),
        coupled=_coupled(chosen, sources) if coupled is None else check_coupled(coupled, sources),
        earlier={name: earlier[name] for name in names if name in earlier},
        outliers=dict((facts or {}).get("outliers", {})),
        curves=dict((facts or {}).get("curve", {})),
        by_hand=hand,
    )
    kept = {name: mask.copy() for name, mask in earlier.items()} | find_masks(question).masks
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
    for name, mask in _fitting(masks, found, where="numpy.masked").items():
        if found[name] is not None:
            check_arrays({name: wide(found[name])}, where="numpy.masked")
            found[name] = np.where(mask, found[name], found[name].dtype.type(0))
    return like(weights, found, where="numpy.masked")


def _sources(
    arrays: Mapping[str, np.ndarray],
    facts: Mapping[str, Mapping[str, Any]],
    layouts: Mapping[str, Layout],
    score: Score,
) -> dict[str, Source]:
    check_facts(facts, arrays, score)
    check_layouts(layouts, arrays)
    sources = {}
    for name, array in arrays.items():
        own = {
            fact: wide(np.asarray(of[name]))
            for fact, of in facts.items()
            if name in of and fact not in OF_TENSORS
        }
        macs = facts.get("macs", {}).get(name, np.nan) / max(array.size, 1)
        source = source_of(
            name, wide(array), facts=own, layout=layouts.get(name), macs=float(macs), where=WHERE
        )
        sources[name] = replace(source, itemsize=array.dtype.itemsize)
    return sources


def _coupled(pattern: Pattern, sources: Mapping[str, Source]) -> list[Coupled]:
    if isinstance(pattern, Layers):
        return [Coupled(name, 1, (Member(name, 0, size=0),)) for name in sources]
    if isinstance(pattern, Units):
        found = [
            Coupled(name, source.shape[source.layout.units], (Member(name, source.layout.units),))
            for name, source in sources.items()
            if source.layout is not None
        ]
        if found:
            return found
    if pattern.coupled:
        raise Unsupported(
            f"which arrays go together as {type(pattern).__name__.lower()} is not known",
            where=WHERE,
            hint="give layouts={name: kk.prune.Layout(...)} for units, or coupled=[...]",
        )
    return []


def _check_real(name: str, array: np.ndarray) -> None:
    check_arrays({name: wide(array)}, where=WHERE)
    if np.iscomplexobj(array):
        raise InvalidArgument("complex weights have no scores", where=f"{WHERE}: {name}")


def _fitting(
    masks: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], *, where: str
) -> Mapping[str, np.ndarray]:
    """Return the masks, or refuse one that is not boolean or has no array of its shape."""
    if not isinstance(masks, Mapping):
        raise InvalidArgument(
            "masks go by the names of arrays", where=where, got=type(masks).__name__
        )
    for name, mask in masks.items():
        if name not in found:
            raise UnknownName(
                "a mask without its array", where=where, got=repr(name), hint=suggest(name, found)
            )
        fits = found[name] is None or np.shape(mask) == np.shape(found[name])
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or not fits:
            raise InvalidArgument(
                "the mask does not fit its array",
                where=f"{where}: {name}",
                got=f"{getattr(mask, 'dtype', type(mask).__name__)} {np.shape(mask)}",
                allowed=f"bool {np.shape(found[name])}",
            )
    return masks
