"""Ranges of activations: a histogram that grows with its data, and what of it a grid should cover."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from karikomi.errors import InvalidArgument, NonFinite, check, check_known
from karikomi.quantize.grids import SMALLEST_SCALE

MOST_BINS = 4096
LEVELS = 256
RATIOS = np.linspace(0.05, 1.0, 96)
PERCENTILE = 99.999

Floats = NDArray[np.float64]
Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class ActivationGrid:
    """An affine grid of unsigned bytes: ``x = scale * (code - zero_point)``, codes in 0..255.

    `scale` > 0, `zero_point` in 0..255; zero is on the grid.

    >>> grid = ActivationGrid.of(-1.0, 3.0)
    >>> grid.zero_point, round(grid.scale, 4)
    (64, 0.0157)

    Source: the asymmetric convention of ONNX Runtime, NNCF and LiteRT.
    """

    scale: float
    zero_point: int

    @classmethod
    def of(cls, low: float, high: float) -> ActivationGrid:
        """Return the grid that covers a range, which is widened to contain zero; scale 1 for the range 0..0."""
        low, high = min(low, 0.0), max(high, 0.0)
        # float32 is what the engine multiplies by.
        scale = float(np.float32((high - low) / (LEVELS - 1)))
        if scale < SMALLEST_SCALE:
            return cls(1.0, 0)
        return cls(scale, int(np.clip(np.rint(-low / scale), 0, LEVELS - 1)))

    def rounded(self, values: Floats) -> Floats:
        """Return the nearest values on the grid."""
        codes = np.rint(values / self.scale) + self.zero_point
        return (np.clip(codes, 0, LEVELS - 1) - self.zero_point) * self.scale


class ActivationHistogram:
    """Counts of the values of one tensor, in at most 4,097 bins whose width is a power of two.

    A batch that exceeds the range doubles the width and adds pairs of bins, so that the counts do not depend on
    the order of the batches. Exact zeros are counted apart: every grid represents them. `name` is used in errors.

    >>> seen = ActivationHistogram("x")
    >>> for batch in ([0.0, 1.0], [3.0, -1.0]):
    ...     seen.add(np.float32(batch))
    >>> seen.low, seen.high, seen.zeros, int(seen.counts.sum())
    (-1.0, 3.0, 1, 3)
    """

    def __init__(self, name: str) -> None:
        self.name, self.zeros, self.low, self.high = name, 0, np.inf, -np.inf
        self._exponent, self._first = 0, 0
        self.counts: NDArray[np.int64] = np.zeros(0, np.int64)

    @property
    def width(self) -> float:
        """The width of a bin."""
        return float(np.ldexp(1.0, self._exponent))

    @property
    def centres(self) -> Floats:
        """The middle of each bin."""
        return np.asarray(
            (self._first + np.arange(len(self.counts)) + 0.5) * self.width, np.float64
        )

    @property
    def edges(self) -> Floats:
        """The left edges of the bins, and the right one of the last."""
        return np.asarray((self._first + np.arange(len(self.counts) + 1)) * self.width, np.float64)

    def add(self, values: ArrayLike) -> None:
        """Count the values of a batch; raises `NonFinite` naming the tensor."""
        array = np.asarray(values, np.float32).reshape(-1)
        if not array.size:
            return
        low, high = float(array.min()), float(array.max())
        if not np.isfinite(high - low):
            raise NonFinite("an activation is NaN or infinite", where=self.name)
        self.low, self.high = min(self.low, low), max(self.high, high)
        others = array[array != 0].astype(np.float64)
        self.zeros += array.size - others.size
        if others.size:
            self._grow_(float(others.min()), float(others.max()))
            places = np.floor(others / self.width).astype(np.int64) - self._first
            self.counts += np.bincount(places, minlength=len(self.counts))

    def _grow_(self, low: float, high: float) -> None:
        """Extend the bins over a range; they always contain zero, so that the width depends on the ends alone."""
        if not len(self.counts):
            self.counts = np.zeros(1, np.int64)
            self._exponent = int(np.frexp(max(high, -low) / MOST_BINS)[1]) - 1
        while True:
            last = self._first + len(self.counts) - 1
            start = min(self._first, int(np.floor(low / self.width)))
            stop = max(last, int(np.floor(high / self.width)))
            if stop - start <= MOST_BINS:
                break
            self._halve_()
        self.counts = np.pad(self.counts, (self._first - start, stop - last))
        self._first = start

    def _halve_(self) -> None:
        """Double the width: bins 2k and 2k + 1 become bin k."""
        odd = self._first % 2
        counts = np.pad(self.counts, (odd, (len(self.counts) + odd) % 2))
        self.counts = counts.reshape(-1, 2).sum(1)
        self._first = (self._first - odd) // 2
        self._exponent += 1


def min_max(seen: ActivationHistogram) -> Range:
    """Return the least and the largest value."""
    return seen.low, seen.high


def percentile(seen: ActivationHistogram, share: float = PERCENTILE) -> Range:
    """Return a range that holds `share` percent of the values, with equal tails on both sides.

    A side with no more values than its tail is not cut. Source: the percentile calibrator of ONNX Runtime
    (99.999 of 2,048 bins).
    """
    order = np.argsort(np.append(seen.centres, 0.0), kind="stable")
    counts = np.append(seen.counts, seen.zeros)[order]
    edges = np.append(seen.edges[:-1], 0.0)[order], np.append(seen.edges[1:], 0.0)[order]
    below = np.cumsum(counts)
    tail = below[-1] * (1 - share / 100) / 2
    low = edges[0][int(np.searchsorted(below, tail, side="right"))]
    high = edges[1][int(np.searchsorted(below, below[-1] - tail, side="left"))]
    return max(float(low), seen.low), min(float(high), seen.high)


def mean_squared_error(seen: ActivationHistogram) -> Range:
    """Return the range whose grid has the least squared error: windows around zero, then each end alone."""
    centres, counts = seen.centres, seen.counts

    def error(ends: Range) -> float:
        apart = ActivationGrid.of(*ends).rounded(centres) - centres
        return float(counts @ (apart * apart))

    low, high = min(_cuts(seen), key=error)
    low = min((low * ratio for ratio in RATIOS), key=lambda end: error((end, high)))
    return low, min((high * ratio for ratio in RATIOS), key=lambda end: error((low, end)))


def _cuts(seen: ActivationHistogram) -> list[Range]:
    """Return the range within windows around zero, from a twentieth of the largest magnitude on."""
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    tops = RATIOS * max(high, -low)
    return [(max(low, -top), min(high, top)) for top in tops.tolist()]


def entropy(seen: ActivationHistogram) -> Range:
    """Return the range with the least divergence ``sum p log(p / q)`` of the values from their rounded form.

    `p`: the counts within the range, those beyond it added to its last bins; `q`: the same counts shared out
    evenly among the bins of each of 256 levels. Source: the calibrator of TensorRT (Migacz 2017), as in ONNX Runtime;
    deviation: exact zeros are not counted.
    """
    return min(_cuts(seen), key=lambda ends: _divergence(seen.centres, seen.counts, ends))


CALIBRATIONS: dict[str, Callable[[ActivationHistogram], Range]] = {
    "minmax": min_max,
    "percentile": percentile,
    "mse": mean_squared_error,
    "entropy": entropy,
}


def activation_grid(seen: ActivationHistogram, calibration: str = "minmax") -> ActivationGrid:
    """Return the grid for a tensor by the name of a calibration: a key of `CALIBRATIONS`.

    A range that a calibration cuts loses its outliers to saturation. Raises `UnknownName`, and `InvalidArgument`
    for a tensor of which nothing was seen.

    >>> seen = ActivationHistogram("x")
    >>> seen.add(np.linspace(0, 2.55, 1000))
    >>> grid = activation_grid(seen)
    >>> grid.zero_point, round(grid.scale, 3)
    (0, 0.01)
    """
    check_known(calibration, CALIBRATIONS, "unknown calibration", where=seen.name)
    if seen.low > seen.high:
        raise InvalidArgument("no values of this tensor were seen", where=seen.name)
    low, high = CALIBRATIONS[calibration](seen)
    check(seen.name, (low <= high, "an empty range", f"{low}..{high}", None))
    return ActivationGrid.of(low, high)


def _divergence(centres: Floats, counts: NDArray[np.int64], ends: Range) -> float:
    grid = ActivationGrid.of(*ends)
    first = -grid.zero_point * grid.scale
    last = first + (LEVELS - 1) * grid.scale
    half = grid.scale / 2
    inside = (centres >= first - half) & (centres <= last + half)
    if not counts[inside].sum():
        return np.inf
    p = counts[inside].astype(np.float64)
    places = np.clip(np.rint(centres[inside] / grid.scale) + grid.zero_point, 0, LEVELS - 1)
    levels = places.astype(np.int64)
    kept = p.copy()
    p[0] += counts[centres < first - half].sum()
    p[-1] += counts[centres > last + half].sum()
    sums = np.bincount(levels, weights=kept, minlength=LEVELS)
    filled = np.bincount(levels, weights=p > 0, minlength=LEVELS)
    q = np.where(p > 0, (sums / np.maximum(filled, 1))[levels], 0.0)
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    # A level that has nothing but values from beyond: a small share keeps the ratio finite.
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-9))).sum())
