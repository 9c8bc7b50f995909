"""Weight sharing: a k-means codebook of the non-zero weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from karikomi.errors import check, check_known
from karikomi.quantize.grids import MOST_VALUES, SMALLEST_SCALE, Codebook, Coded
from karikomi.quantize.nearest import finite
from karikomi.quantize.units import OutputUnits
from karikomi.quantize.weight_ranges import Floats
from karikomi.registry import register


def kmeans(
    weights: ArrayLike,
    *,
    entries: int = 16,
    iterations: int = 30,
    start: str = "linear",
    importance: ArrayLike | None = None,
    seed: int = 0,
    name: str = "weights",
) -> Coded:
    """Share `entries` values among the non-zero weights; zeros stay exact, as code 0.

    One-dimensional Lloyd iterations: assign each non-zero weight to the nearest centroid, move the
    centroid to the mean, at most `iterations` times or until no centroid moves. Where the weights have no more than
    `entries` distinct values, these are the codebook and nothing is lost. A centroid that comes out as zero (a cluster
    around it with weights of both signs) is moved to 2**-126: a non-zero weight never becomes zero.

    `weights` is a real array of any shape; `entries` counts the centroids beside the zero symbol
    and is in 1..65535 (the codebook has ``entries + 1`` values or fewer: empty clusters are dropped);
    `iterations` >= 0. `start`: "linear" spaces the centroids evenly over [min, max], "density" over the ranks of the
    weights, "random" draws weights by `seed`. `importance`: an array of the shape of the weights, finite and >= 0, such
    as squared gradients: means are weighted by it, plus a thousandth of its mean. Centroids ascend; the result depends
    on the arguments alone. `name` is used in errors only. Raises `InvalidArgument`, or `NonFinite` for NaN or infinite
    weights.

    >>> coded = kmeans(np.float32([0.0, 1.0, 1.5, -2.0, 0.0]), entries=2)
    >>> coded.grid.values.tolist(), coded.codes.tolist()
    ([0.0, -2.0, 1.25], [0, 2, 2, 1, 0])

    Source: Han, Mao, Dally, "Deep Compression", ICLR 2016 (linear, density and random initialisation, section 3.2);
    Choi, El-Khamy and Lee, "Towards the Limit of Network Quantization", ICLR 2017 (weighted by the Hessian's
    diagonal). Zero as a symbol of its own, which no other symbol may equal, is our deviation.
    """
    array = finite(weights, name)
    some = type(entries) is int and 1 <= entries < MOST_VALUES
    whole = type(iterations) is int and iterations >= 0
    where = f"kmeans of {name}"
    check(
        where,
        (some, "entries out of range", entries, f"1..{MOST_VALUES - 1}"),
        (whole, "iterations out of range", iterations, ">= 0"),
    )
    check_known(start, STARTS, "unknown start", where=where)
    used = array != 0
    mass = _masses(importance, array.shape, where)[used]
    order = np.argsort(array[used], kind="stable")
    ordered = array[used][order]
    first = STARTS[start](ordered.astype(np.float64), entries, np.random.default_rng(seed))
    few = np.unique(ordered)
    exact = few.size <= entries
    centroids = few if exact else _centroids(ordered, mass[order], first, iterations)
    values = np.concatenate([np.zeros(1, np.float32), centroids])
    grid = Codebook(values)
    codes = np.where(array == 0, 0, 1 + np.searchsorted(_midpoints(centroids), array))
    return Coded(codes.astype(grid.code_dtype).reshape(array.shape), grid)


@register(
    "quantizer",
    name="kmeans",
    formula="w = values[code], values by 1-D k-means of the non-zero weights of a tensor",
    source="Han, Mao and Dally 2016, Deep Compression",
)
@dataclass(frozen=True, slots=True, kw_only=True)
class KMeansQuantizer:
    """`kmeans` as a quantizer: one codebook per tensor. `start`, `iterations` and `seed` as there.

    For ``quantize_(entries=, method=KMeansQuantizer(start="density"))``; ``"kmeans"`` is the one with the defaults.

    >>> coded = KMeansQuantizer(iterations=0).quantize(np.float32([1.0, 1.2, 4.0]), 2, units=OutputUnits(0))
    >>> coded.grid.values.tolist()
    [0.0, 1.0, 4.0]

    Source: Han, Mao and Dally 2016.
    """

    start: str = "linear"
    iterations: int = 30
    seed: int = 0

    argument = "entries"
    weighted = True

    def quantize(
        self,
        weights: NDArray,
        size: int,
        *,
        units: OutputUnits,
        name: str = "weights",
        importance: NDArray | None = None,
    ) -> Coded:
        """Return codes of at most `size` non-zero values and their codebook."""
        given: dict[str, Any] = {"start": self.start, "seed": self.seed, "importance": importance}
        return kmeans(weights, entries=size, iterations=self.iterations, name=name, **given)


def _linear(ordered: Floats, entries: int, random: np.random.Generator) -> Floats:
    return np.linspace(ordered[0], ordered[-1], entries) if ordered.size else ordered


def _density(ordered: Floats, entries: int, random: np.random.Generator) -> Floats:
    middles = (np.arange(entries) + 0.5) / entries
    return np.unique(np.quantile(ordered, middles)) if ordered.size else ordered


def _random(ordered: Floats, entries: int, random: np.random.Generator) -> Floats:
    distinct = np.unique(ordered)
    return np.sort(random.choice(distinct, min(entries, distinct.size), replace=False))


STARTS: dict[str, Callable[[Floats, int, np.random.Generator], Floats]] = {
    "linear": _linear,
    "density": _density,
    "random": _random,
}
"""Name -> the centroids before the first iteration, of weights in ascending order."""


def _masses(importance: ArrayLike | None, shape: tuple[int, ...], where: str) -> Floats:
    if importance is None:
        return np.ones(shape)
    mass = np.asarray(importance, np.float64)
    fits = mass.shape == shape and bool(np.isfinite(mass).all()) and bool((mass >= 0).all())
    allowed = f"finite numbers >= 0 of shape {shape}"
    check(where, (fits, "the importance does not fit the weights", mass.shape, allowed))
    mean = float(mass.mean()) if mass.size else 0.0
    return mass / mean + 1e-3 if mean > 0.0 else np.ones(shape)


def _centroids(
    ordered: NDArray[np.float32], mass: Floats, centroids: Floats, iterations: int
) -> NDArray[np.float32]:
    masses = np.concatenate([[0.0], np.cumsum(mass)])
    sums = np.concatenate([[0.0], np.cumsum(mass * ordered.astype(np.float64))])
    for _ in range(iterations):
        moved = _means(ordered, masses, sums, centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    rounded = centroids.astype(np.float32)
    # The smallest change: the error of the weights is that of the mean, to all digits.
    rounded[rounded == 0] = SMALLEST_SCALE
    rounded = np.unique(rounded)
    return rounded[np.diff(_bounds(ordered, rounded)) > 0]


def _means(ordered: NDArray[np.float32], masses: Floats, sums: Floats, centroids: Floats) -> Floats:
    bounds = _bounds(ordered, centroids)
    filled = np.diff(bounds) > 0
    return np.diff(sums[bounds])[filled] / np.diff(masses[bounds])[filled]


def _bounds(ordered: NDArray[np.float32], centroids: NDArray[np.floating]) -> NDArray[np.intp]:
    # A weight exactly half-way is assigned to the lower centroid, here and in the final assignment.
    inner = np.searchsorted(ordered, _midpoints(centroids), side="right")
    return np.concatenate([[0], inner, [ordered.size]])


def _midpoints(centroids: NDArray[np.floating]) -> NDArray[np.float64]:
    wide = centroids.astype(np.float64)
    return (wide[1:] + wide[:-1]) / 2
