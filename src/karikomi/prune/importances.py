"""Scores by name, to look at or to prune by later: what a network's weights or units are worth, without pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

BINS = 16
_BARS = " ▁▂▃▄▅▆▇█"


class Spread(NamedTuple):
    """The scores of one tensor in numbers; `counts`: of a histogram whose edges all tensors share."""

    name: str
    items: int
    least: float
    median: float
    mean: float
    largest: float
    share: float
    counts: tuple[int, ...]


class Importances(Mapping[str, Any]):
    """Tensor name -> scores: of the weight's shape for single weights, else one per unit, head, layer or block.

    `score`: what they are. `left_alone`: name -> why a tensor has none. ``prune_(..., importance=scores)`` takes
    those of single weights. Prints as a table, with a histogram for each tensor.

    >>> scores = Importances({"fc": np.array([[1.0, 2.0], [3.0, 10.0]], np.float32)}, score="magnitude")
    >>> scores["fc"].tolist(), scores.spreads()[0].mean, scores.spreads()[0].share
    ([[1.0, 2.0], [3.0, 10.0]], 4.0, 1.0)
    """

    def __init__(
        self,
        values: Mapping[str, np.ndarray],
        *,
        score: str,
        left_alone: Mapping[str, str] | None = None,
        as_array: Callable[[np.ndarray, str], Any] | None = None,
    ) -> None:
        self._values = dict(values)
        self.score = score
        self.left_alone = dict(left_alone or {})
        self._as_array = as_array

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        return value if self._as_array is None else self._as_array(value, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Importances({len(self)} tensors, {self.score})"

    def edges(self) -> np.ndarray:
        """Return the `BINS` + 1 edges of the histograms: in equal steps of the logarithm if no score is negative."""
        some = [value for value in self._values.values() if value.size]
        low = min((float(value.min()) for value in some), default=0.0)
        high = max((float(value.max()) for value in some), default=0.0)
        if low < 0.0 or high <= 0.0:
            return np.linspace(low, high if high > low else low + 1.0, BINS + 1)
        positive = [value[value > 0.0] for value in some]
        least = min(float(value.min()) for value in positive if value.size)
        # What is a millionth of the largest, or zero, is in the first bin.
        edges = np.geomspace(min(max(least, high * 1e-6), high / 2.0), high, BINS + 1)
        edges[0], edges[-1] = 0.0, high
        return edges

    def spreads(self) -> list[Spread]:
        """Return one row per tensor, in the order of the model; `share` is that of the sum of all magnitudes."""
        edges = self.edges()
        sums = {n: float(np.abs(v).sum(dtype=np.float64)) for n, v in self._values.items()}
        whole = sum(sums.values()) or 1.0
        rows = []
        for name, value in self._values.items():
            flat = value.reshape(-1)
            numbers = (
                (flat.min(), np.median(flat), flat.mean(dtype=np.float64), flat.max())
                if flat.size
                else (0.0,) * 4
            )
            least, median, mean, largest = map(float, numbers)
            counts = tuple(np.histogram(flat, edges)[0].tolist())
            rows.append(
                Spread(name, flat.size, least, median, mean, largest, sums[name] / whole, counts)
            )
        return rows

    def __str__(self) -> str:
        """Return a table with one line per tensor, and its histogram."""
        rows, edges = self.spreads(), self.edges()
        width = max([len(row.name) for row in rows] + [len("tensor")])
        names = ("least", "median", "mean", "largest")
        head = f"{'tensor':<{width}} {'items':>11} " + " ".join(f"{name:>9}" for name in names)
        lines = [f"{head} {'share':>6}  {self.score}, {edges[0]:.3g} to {edges[-1]:.3g}"]
        for row in rows:
            numbers = " ".join(f"{getattr(row, name):>9.3g}" for name in names)
            lines.append(
                f"{row.name:<{width}} {row.items:>11,} {numbers} {row.share:>6.1%}  {bars(row.counts)}"
            )
        return "\n".join(lines)


def bars(counts: tuple[int, ...]) -> str:
    """Return a histogram in one line; a bin that is not empty has at least the lowest bar.

    >>> bars((0, 1, 8, 4))
    '▕ ▁█▄▏'
    """
    most = max(counts, default=0) or 1
    levels = [-(-count * (len(_BARS) - 1) // most) for count in counts]
    return "▕" + "".join(_BARS[level] for level in levels) + "▏"
