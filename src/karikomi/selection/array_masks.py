"""Masks of host arrays by name: the whole prune request of NumPy and JAX, where facts are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from karikomi.prune import Coupled, Importance, Layout
from karikomi.prune.facts import check_names
from karikomi.selection.array_arguments import (
    check_array_facts,
    check_coupled,
    check_layouts,
    check_masks,
    check_weight,
    wide,
)
from karikomi.selection.exact_masks import SelectionRequest, find_masks, find_scores
from karikomi.selection.request import PruneRequest, check_masks_alone, facts_of, selected
from karikomi.selection.weight_source import Source, source_of


class Beside(NamedTuple):
    """What a caller passes beside arrays and request: see `karikomi.numpy.prune`."""

    layouts: Mapping[str, Layout] | None
    coupled: Sequence[Coupled] | None
    masks: Mapping[str, Any] | None


def masks_of_arrays(
    arrays: Mapping[str, Any],
    request: PruneRequest,
    beside: Beside,
    leaf: str = "array",
) -> dict[str, np.ndarray]:
    """Return name -> mask of the selected arrays, and copies of earlier masks of others; errors call one `leaf`."""
    check_masks_alone(request.score, where=request.where)
    selection = _selection(arrays, request, beside, leaf)
    earlier = {name: np.array(mask) for name, mask in (beside.masks or {}).items()}
    return earlier | find_masks(selection).masks


def scores_of_arrays(
    arrays: Mapping[str, Any], request: PruneRequest, beside: Beside, leaf: str = "array"
) -> dict[str, np.ndarray]:
    """Return name -> scores of the selected arrays, see `find_scores`."""
    return find_scores(_selection(arrays, request, beside, leaf))


def _selection(
    arrays: Mapping[str, Any], request: PruneRequest, beside: Beside, leaf: str
) -> SelectionRequest:
    where = request.where
    names, _ = selected(
        arrays, {}, only=request.only, exclude=request.exclude, where=where, allowed="arrays"
    )
    if isinstance(request.score, Importance):
        check_names(request.facts.get("importance", {}), arrays, where=f"{where}: importance")
    names, _ = request.with_importance(names)
    for name in names:
        check_weight(arrays[name], where=f"{where}: {name}")
    earlier = {} if beside.masks is None else beside.masks
    check_masks(earlier, arrays, where=where, leaf=leaf)
    earlier = {name: np.asarray(mask) for name, mask in earlier.items()}
    shares = request.by_hand(names)
    chosen = {name: arrays[name] for name in names if name in (shares or names)}
    layouts = {} if beside.layouts is None else beside.layouts
    request = request.of(chosen)
    check_array_facts(request.facts, request.score.needs, chosen, where=where)
    check_layouts(layouts, chosen, where=where)
    sources = {
        name: _source(name, array, request, layouts.get(name)) for name, array in chosen.items()
    }
    coupled: Sequence[Coupled] = ()
    if beside.coupled is not None:
        coupled = check_coupled(beside.coupled, sources, where=where)
    elif request.pattern.coupled:
        hint = "give layouts={name: kk.prune.Layout(...)} for units, or coupled=[...]"
        shapes = {name: source.shape for name, source in sources.items()}
        coupled, _ = request.grouped(shapes, layouts, {}, hint=hint)
    return request.selection(
        sources,
        request.facts,
        shares=shares,
        coupled=coupled,
        earlier={name: earlier[name] for name in sources if name in earlier},
    )


def _source(name: str, array: np.ndarray, request: PruneRequest, layout: Layout | None) -> Source:
    facts = facts_of(name, request.facts)
    macs = request.facts.get("macs", {}).get(name, np.nan) / max(array.size, 1)
    known = {fact: wide(np.asarray(values)) for fact, values in facts.items()}
    source = source_of(
        name, wide(array), facts=known, layout=layout, macs=float(macs), where=request.where
    )
    return replace(source, itemsize=array.dtype.itemsize)
