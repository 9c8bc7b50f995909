"""Seeded, stratified splits of one set of examples: which of them choose, and which of them judge."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from karikomi.errors import check


def partition(strata: np.ndarray, counts: Mapping[str, int], *, seed: int) -> dict[str, np.ndarray]:
    """Return name -> sorted places, disjoint, of exactly so many examples each.

    `strata`: (n,) the class of each example, or any value whose proportions the parts should keep. `counts`:
    name -> number, together at most n. The examples of a class are shuffled by `seed` and dealt to the
    parts in proportion, so that each part has its share of every class to within two examples.

    >>> parts = partition(np.repeat([0, 1], [6, 4]), {"search": 5, "certify": 5}, seed=0)
    >>> [np.bincount(np.repeat([0, 1], [6, 4])[part]).tolist() for part in parts.values()]
    [[3, 2], [3, 2]]
    """
    total, n = sum(counts.values()), len(strata)
    whole = all(isinstance(count, int) and count >= 0 for count in counts.values())
    check(
        "partition",
        (whole and counts, "the parts need numbers of examples", dict(counts), ">= 0"),
        (total <= n, "the parts have more examples than there are", total, f"<= {n}"),
    )
    random = np.random.default_rng(seed).random(n)
    _, classes = np.unique(strata, return_inverse=True)
    order = np.lexsort((random, classes.reshape(-1)))
    dealt = _dealt({**counts, "": n - total})
    return {name: np.sort(order[dealt == place]) for place, name in enumerate(counts)}


def _dealt(counts: Mapping[str, int]) -> np.ndarray:
    """Return the part of each place in turn, every part spread as evenly as its number allows."""
    turns = [(np.arange(count) + 0.5) / max(count, 1) for count in counts.values()]
    parts = np.repeat(np.arange(len(counts)), [len(turn) for turn in turns])
    return parts[np.argsort(np.concatenate(turns), kind="stable")]
