"""Weight sharing: a k-means codebook of the non-zero weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from karikomi.errors import check
from karikomi.quantize.grids import MOST_VALUES, SMALLEST_SCALE, Codebook, Coded
from karikomi.quantize.nearest import finite
from karikomi.quantize.units import OutputUnits
from karikomi.registry import register


def kmeans(
    weights: ArrayLike, *, entries: int = 16, iterations: int = 30, name: str = "weights"
) -> Coded:
    """Share `entries` values among the non-zero weights; zeros stay exact, as code 0.

    One-dimensional Lloyd iterations: assign each non-zero weight to the nearest centroid, move the
    centroid to the mean, at most `iterations` times or until no centroid moves; the start is spaced
    evenly over [min, max]. Where the weights have no more than `entries` distinct values, these
    are the codebook and nothing is lost. A centroid that comes out as zero (a cluster around it
    with weights of both signs) is moved to 2**-126: a non-zero weight never becomes zero.

    `weights` is a real array of any shape; `entries` counts the centroids beside the zero symbol
    and is in 1..65535 (the codebook has ``entries + 1`` values or fewer: empty clusters are dropped);
    `iterations` >= 0. Centroids ascend; the result depends on the arguments alone. `name` is used
    in errors only. Raises `InvalidArgument`, or `NonFinite` for NaN or infinite weights.

    >>> coded = kmeans(np.float32([0.0, 1.0, 1.5, -2.0, 0.0]), entries=2)
    >>> coded.grid.values.tolist(), coded.codes.tolist()
    ([0.0, -2.0, 1.25], [0, 2, 2, 1, 0])

    Source: Han, Mao, Dally, "Deep Compression", ICLR 2016 (linear initialisation, section 3.2);
    zero as a symbol of its own, which no other symbol may equal, is our deviation.
    """
    array = finite(weights, name)
    some = type(entries) is int and 1 <= entries < MOST_VALUES
    whole = type(iterations) is int and iterations >= 0
    check(
        f"kmeans of {name}",
        (some, "entries out of range", entries, f"1..{MOST_VALUES - 1}"),
        (whole, "iterations out of range", iterations, ">= 0"),
    )
    ordered = np.sort(array[array != 0])
    centroids = _centroids(ordered, entries, iterations)
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
class KMeansQuantizer:
    """`kmeans`: one codebook per tensor."""

    argument = "entries"

    def quantize(
        self, weights: NDArray, size: int, *, units: OutputUnits, name: str = "weights"
    ) -> Coded:
        """Return codes of at most `size` non-zero values and their codebook."""
        return kmeans(weights, entries=size, name=name)


def _centroids(ordered: NDArray[np.float32], entries: int, iterations: int) -> NDArray[np.float32]:
    starts = np.flatnonzero(np.diff(ordered, prepend=np.float32(np.nan)))
    if starts.size <= entries:
        return ordered[starts]
    sums = np.concatenate([[0.0], np.cumsum(ordered, dtype=np.float64)])
    centroids = np.linspace(float(ordered[0]), float(ordered[-1]), entries)
    for _ in range(iterations):
        moved = _means(ordered, sums, centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    rounded = centroids.astype(np.float32)
    # The smallest change: the error of the weights is that of the mean, to all digits.
    rounded[rounded == 0] = SMALLEST_SCALE
    rounded = np.unique(rounded)
    return rounded[np.diff(_bounds(ordered, rounded)) > 0]


def _means(
    ordered: NDArray[np.float32], sums: NDArray[np.float64], centroids: NDArray[np.float64]
) -> NDArray[np.float64]:
    bounds = _bounds(ordered, centroids)
    counts = np.diff(bounds)
    filled = counts > 0
    return np.diff(sums[bounds])[filled] / counts[filled]


def _bounds(ordered: NDArray[np.float32], centroids: NDArray[np.floating]) -> NDArray[np.intp]:
    # A weight exactly half-way is assigned to the lower centroid, here and in the final assignment.
    inner = np.searchsorted(ordered, _midpoints(centroids), side="right")
    return np.concatenate([[0], inner, [ordered.size]])


def _midpoints(centroids: NDArray[np.floating]) -> NDArray[np.float64]:
    wide = centroids.astype(np.float64)
    return (wide[1:] + wide[:-1]) / 2
