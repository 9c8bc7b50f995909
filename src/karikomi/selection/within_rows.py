"""Selections within the rows of one weight: so many of each unit, or n of every m inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from karikomi.errors import NonFinite, Unsupported
from karikomi.prune.pattern import NofM
from karikomi.prune.scores.score import Score
from karikomi.selection.block_scores import weight_scores
from karikomi.selection.granularity import layout_of, whole_fact
from karikomi.selection.weight_source import Source

ENTRIES = 1 << 20


def keep_within_rows(source: Source, score: Score, remove: int, out: np.ndarray) -> None:
    """Clear in `out` the lowest of each row until `remove` are cleared, the same number from each row.

    What does not divide evenly goes from the first rows, one more each. What is cleared already counts;
    a row that has lost more than its share keeps the rest, and the others lose less. Ties by index.
    """
    layout = layout_of(source)
    view = layout.canonical(out)
    quotas = _quotas(view.reshape(len(view), -1), remove)
    for rows, scores in _canonical_scores(source, score, view, layout.canonical):
        order = scores.reshape(len(scores), -1).argsort(axis=1, kind="stable")
        ranks = np.empty_like(order)
        np.put_along_axis(ranks, order, np.arange(order.shape[1])[None], axis=1)
        view[rows] &= (ranks >= quotas[rows, None]).reshape(scores.shape)


def _quotas(kept: np.ndarray, remove: int) -> np.ndarray:
    """Return how many are cleared of each row afterwards: `remove` in all, or what is cleared already."""
    gone = kept.shape[1] - np.count_nonzero(kept, axis=1)
    low, high = 0, kept.shape[1]
    while low < high:
        middle = (low + high + 1) // 2
        if np.maximum(gone, middle).sum() <= remove:
            low = middle
        else:
            high = middle - 1
    quotas = np.maximum(gone, low)
    more = max(remove - int(quotas.sum()), 0)
    quotas[np.flatnonzero(gone <= low)[:more]] += 1
    return quotas


def keep_n_of_m(source: Source, score: Score, pattern: NofM, out: np.ndarray) -> None:
    """Clear in `out` all but the best `keep` of every `of` inputs; ties by index."""
    layout = layout_of(source)
    view = layout.canonical(out)
    for rows, scores in _canonical_scores(source, score, view, layout.canonical):
        width = scores.shape[-1]
        missing = -width % pattern.of
        filled = np.pad(
            scores, [(0, 0)] * (scores.ndim - 1) + [(0, missing)], constant_values=-np.inf
        )
        groups = filled.reshape(-1, pattern.of)
        order = groups.argsort(axis=1, kind="stable")
        stays = np.zeros(groups.shape, bool)
        np.put_along_axis(stays, order[:, pattern.of - pattern.keep :], True, axis=1)
        view[rows] &= stays.reshape(filled.shape)[..., :width]


def divides(source: Source, pattern: NofM) -> bool:
    """Return whether the inputs of a weight are a multiple of `of`."""
    layout = layout_of(source)
    return layout.inputs is not None and source.shape[layout.inputs] % pattern.of == 0


def _canonical_scores(
    source: Source,
    score: Score,
    kept: np.ndarray,
    canonical: Callable[[np.ndarray], np.ndarray],
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield ``(rows, their scores)``, minus infinity for what is gone already."""
    if score.of_tensors:
        raise Unsupported(
            f"{type(score).__name__} ranks the weights of a whole tensor, and not those of a row",
            where="score",
            hint='score="magnitude"',
        )
    weights = canonical(source.array())
    facts: Mapping[str, np.ndarray] = {
        name: canonical(whole_fact(source, name)) for name in sorted(score.needs)
    }
    step = max(ENTRIES // max(weights[0].size, 1), 1)
    for start in range(0, len(weights), step):
        rows = slice(start, min(start + step, len(weights)))
        own = {name: np.asarray(fact[rows], np.float32) for name, fact in facts.items()}
        with np.errstate(over="ignore"):
            narrow = weights[rows].astype(np.float32)
        scores = weight_scores(score, narrow, own, where=source.label)
        if not np.isfinite(scores).all():
            raise NonFinite("a weight or its score is NaN or infinite", where=source.label)
        yield rows, np.where(kept[rows], scores, -np.inf)
