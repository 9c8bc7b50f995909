"""Which classes and slices pay for a smaller network: an exact paired test for each, all at one level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import special

from karikomi.audit.paired.mean_tests import rise_p
from karikomi.audit.paired.paired_outcomes import (
    PairedOutcomes,
    drop_interval,
    holm,
    least_lost,
    mcnemar,
)
from karikomi.audit.paired.share_intervals import LEVEL
from karikomi.errors import InvalidArgument

ALPHA = 0.01
"""The probability that any slice is named although none pays."""


def slice_rows(
    outcomes: PairedOutcomes,
    members: Mapping[str, np.ndarray],
    *,
    sources: np.ndarray | None = None,
    alpha: float = ALPHA,
) -> list[dict[str, Any]]:
    """Return one row per slice: shares that are right, flips, drop with its interval, adjusted p, and what n hides.

    `members`: name -> indices or a boolean per example; slices may overlap. The test is one-sided: is it likelier that
    an example of the slice is lost than gained? ``p`` is adjusted by Holm over all slices; ``least_drop`` is the
    smallest drop of the slice that could be named at `alpha`. `sources`: where several targets come from one example
    (pixels, tokens), the example of each; these are not independent, and the test is of the sums of the examples.

    >>> before = np.ones(40, bool)
    >>> after = before.copy()
    >>> after[:12] = False
    >>> halves = {"first": np.arange(20), "second": np.arange(20, 40)}
    >>> rows = slice_rows(PairedOutcomes(before, after, before != after), halves)
    >>> [(row["slice"], row["lost"], row["p"] < 0.01) for row in rows]
    [('first', 12, True), ('second', 0, False)]
    """
    if not members:
        return []
    parts = {name: outcomes.take(chosen) for name, chosen in members.items()}
    if sources is None:
        tests = [mcnemar(part.lost, part.gained) for part in parts.values()]
    else:
        tests = [_by_source(parts[name], sources[chosen]) for name, chosen in members.items()]
    adjusted = holm(np.array(tests))
    fewest = least_lost(len(parts), alpha)
    return [
        {
            "slice": name,
            "examples": len(part.before),
            "before": float(np.mean(part.before)) if len(part.before) else None,
            "after": float(np.mean(part.after)) if len(part.after) else None,
            "lost": part.lost,
            "gained": part.gained,
            "drop": (part.lost - part.gained) / len(part.before) if len(part.before) else None,
            "drop_interval": list(drop_interval(part.lost, part.gained, len(part.before))),
            "p": float(p),
            "least_drop": fewest / max(len(part.before), 1),
            "named": bool(p <= alpha),
        }
        for (name, part), p in zip(parts.items(), adjusted, strict=True)
    ]


def mean_rows(
    worse: np.ndarray,
    scores: tuple[np.ndarray, np.ndarray],
    members: Mapping[str, np.ndarray],
    *,
    alpha: float = ALPHA,
) -> list[dict[str, Any]]:
    """Return the rows of `slice_rows` for a metric that is the mean of a number per example.

    `worse` (n,): by how much each example got worse; `scores`: its number in both networks. ``before`` and ``after``
    are means; ``lost`` and ``gained`` count examples that got worse and better; ``drop`` is the mean of `worse`, with
    its standard ``error`` and interval, tested against 0 by a one-sided normal test. ``least_drop``: the smallest drop
    that would be named.

    >>> worse = np.concatenate([np.linspace(0.9, 1.1, 40), np.tile([-0.1, 0.1], 20)])
    >>> halves = {"first": np.arange(40), "second": np.arange(40, 80)}
    >>> rows = mean_rows(worse, (np.zeros(80), worse), halves)
    >>> [(row["slice"], round(row["drop"], 3), row["named"]) for row in rows]
    [('first', 1.0, True), ('second', 0.0, False)]
    """
    adjusted = holm(np.array([rise_p(worse[chosen]) for chosen in members.values()]))
    strict = -float(special.ndtri(alpha / max(len(members), 1)))
    rows = []
    for (name, chosen), p in zip(members.items(), adjusted, strict=True):
        own, n = worse[chosen], len(worse[chosen])
        error = float(own.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
        means = [float(part[chosen].mean()) if n else None for part in scores]
        drop = float(own.mean()) if n else None
        rows.append(
            {
                "slice": name,
                "examples": n,
                "before": means[0],
                "after": means[1],
                "lost": int(np.sum(own > 0)),
                "gained": int(np.sum(own < 0)),
                "drop": drop,
                "error": error if n > 1 else None,
                "drop_interval": [drop - _TWO_SIDED * error, drop + _TWO_SIDED * error]
                if drop is not None and n > 1
                else None,
                "p": float(p),
                "least_drop": strict * error if n > 1 else None,
                "named": bool(p <= alpha),
            }
        )
    return rows


_TWO_SIDED = -float(special.ndtri((1.0 - LEVEL) / 2))


def risen_p(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray, sources: np.ndarray | None = None
) -> np.ndarray:
    """Return for each label the adjusted p that the second network predicts it no more often than the first.

    `first`, `second`: predictions of the same targets; `sources`: as in `slice_rows`. One-sided, adjusted by Holm.

    >>> before, after = np.zeros(40, int), np.repeat([1, 0], 20)
    >>> [p < 0.01 for p in risen_p(before, after, np.array([0, 1])).tolist()]
    [False, True]
    """
    tests = []
    for label in labels:
        was, now = first == label, second == label
        more = PairedOutcomes(now, was, now != was)
        tests.append(
            mcnemar(more.lost, more.gained) if sources is None else _by_source(more, sources)
        )
    return holm(np.array(tests))


def _by_source(part: PairedOutcomes, sources: np.ndarray) -> float:
    _, places = np.unique(sources, return_inverse=True)
    return rise_p(np.bincount(places, weights=part.before.astype(float) - part.after))


def members_of(slices: Mapping[str, Any], places: np.ndarray, total: int) -> dict[str, np.ndarray]:
    """Return slice -> its members among the targets that count.

    `slices`: name -> a boolean per example, or a label per example, which makes a slice of each label. `places`: the
    example of each target; `total`: how many examples there are. Raises `InvalidArgument` for other lengths.
    """
    found: dict[str, np.ndarray] = {}
    for name, given in slices.items():
        labels = np.asarray(given)
        if labels.shape != (total,):
            raise InvalidArgument(
                "a slice has an entry per example",
                where=f"audit: slice {name}",
                got=labels.shape,
                allowed=(total,),
            )
        if labels.dtype == bool:
            found[name] = np.flatnonzero(labels[places])
            continue
        for label in np.unique(labels).tolist():
            found[f"{name}={label}"] = np.flatnonzero((labels == label)[places])
    return found
