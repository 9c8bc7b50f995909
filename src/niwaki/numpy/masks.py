"""Prune trees of weights held as NumPy arrays, and keep pruned weights at zero.

The readable reference of what the frameworks do in blocks and from histograms: one stable sort.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from niwaki import registry, tree
from niwaki.errors import InvalidArgument, NonFinite, UnknownName, suggest
from niwaki.numpy.arrays import Arrays, like, named
from niwaki.numpy.measure import check_arrays
from niwaki.prune import allocate
from niwaki.select import select

Masks = dict[str, np.ndarray]


def prune(
    weights: Arrays,
    *,
    sparsity: float,
    score: str = "magnitude",
    allocation: str = "global",
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
) -> tuple[Arrays, Masks]:
    """Return ``(weights with the least important at zero, masks)``; the input is left alone.

    Scores are taken in float32; of each pool of the allocation exactly the asked number goes, ties by
    the order of the arrays, then of their entries. A mask is true where a weight is kept; arrays
    that were not selected have none.

    `weights`: any tree of dicts, lists, tuples and named tuples of floating arrays. `sparsity`: the
    share of all selected weights that is zero afterwards, in [0, 1). `score`, `allocation`:
    registered names. `only`, `exclude`: globs over the names of arrays (default: all of them, biases
    too). `masks`: earlier masks by name; what they removed stays removed and counts.

    Raises `InvalidArgument` for the sparsity and for what is no such tree or does not fit it,
    `UnknownName` for a name or glob, `NonFinite` naming an array with NaN or infinite weights.

    >>> import numpy as np
    >>> layers = [{"weight": np.array([[3.0, -1.0, 2.0, -4.0]]), "bias": np.zeros(1)}]
    >>> pruned, masks = prune(layers, sparsity=0.5, only="*weight")
    >>> pruned[0]["weight"].tolist(), masks["0.weight"].tolist()
    ([[3.0, 0.0, 0.0, -4.0]], [[True, False, False, True]])

    Source: Han et al. 2015 (magnitude); Frankle and Carbin 2019 (global).
    """
    where = "numpy.prune"
    weights = tree.collected(weights)
    found = named(weights, where=where)
    names = select(found, only=only, exclude=exclude, where=where)
    scores = {name: _scores(name, found[name], score, where=where) for name in names}
    kept = {name: mask.copy() for name, mask in _fitting(masks or {}, found, where=where).items()}
    for name in names:
        kept.setdefault(name, np.ones(found[name].shape, dtype=bool))
    sizes = {name: found[name].size for name in names}
    for pool in allocate(allocation, sizes, sparsity):
        _prune_pool(pool.names, scores, kept, pool.remove)
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
            check_arrays({name: found[name]}, where="numpy.masked")
            found[name] = np.where(mask, found[name], found[name].dtype.type(0))
    return like(weights, found, where="numpy.masked")


def _scores(name: str, array: np.ndarray, score: str, *, where: str) -> np.ndarray:
    check_arrays({name: array}, where=where)
    if np.iscomplexobj(array):
        raise InvalidArgument("complex weights have no scores", where=f"{where}: {name}")
    with np.errstate(over="ignore"):
        scores = registry.find("score", score)(array.astype(np.float32), xp=np)
    if not (np.isfinite(scores).all() and (scores >= 0).all()):
        raise NonFinite(
            "a weight or its score is NaN, infinite or negative", where=f"{where}: {name}"
        )
    return scores


def _prune_pool(
    names: Sequence[str], scores: Mapping[str, np.ndarray], kept: Masks, remove: int
) -> None:
    """Clear so many more entries of the masks that `remove` are cleared, if fewer are now."""
    mask = np.concatenate([kept[name].ravel() for name in names])
    left = np.flatnonzero(mask)
    every = np.concatenate([scores[name].ravel() for name in names])
    more = max(remove - (mask.size - left.size), 0)
    mask[left[np.argsort(every[left], kind="stable")[:more]]] = False
    ends = np.cumsum([kept[name].size for name in names])
    for name, part in zip(names, np.split(mask, ends[:-1]), strict=True):
        kept[name] = part.reshape(kept[name].shape)


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
