"""What the rules of a post-mortem look at: logarithms of all series, their scores, and the quiet part of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from karikomi.advising.detection import FLOOR, LEAST, WINDOW, filled, level, robust_z
from karikomi.advising.recorded import Recorded
from karikomi.record.log_codes import log2_of

LN2 = math.log(2.0)
BEFORE, AFTER = 512, 64
"""How many rows before and after an event the series of tensors are looked at in full."""

COARSE = 256
"""In how many parts slow changes of tensors are looked at, over the whole run."""

SPIKE = 6.0
"""A norm or loss of so many robust standard deviations above the median before is an excursion."""


class Signals:
    """The series of a run on the log scale, computed when they are asked for."""

    def __init__(self, run: Recorded) -> None:
        self.run = run

    @cached_property
    def norm(self) -> np.ndarray:
        """The logarithm of the global norm, the last finite one in place of others, shape (T,)."""
        return filled(_log(self.run.columns["norm"]))

    @cached_property
    def loss(self) -> np.ndarray:
        """The logarithm of the loss, shape (T,); of one that can be negative the loss itself over its spread."""
        loss = self.run.columns["loss"]
        finite = loss[np.isfinite(loss)]
        if finite.size and finite.min() < 0.0:
            scale = float(np.median(np.abs(finite - np.median(finite)))) or 1.0
            return filled(loss / (10.0 * scale))
        return filled(_log(loss))

    @cached_property
    def norm_z(self) -> np.ndarray:
        """The robust z-score of the global norm, shape (T,)."""
        return robust_z(self.norm)

    @cached_property
    def loss_z(self) -> np.ndarray:
        """The robust z-score of the loss, shape (T,)."""
        return robust_z(self.loss) if self.run.has("loss") else np.zeros(len(self.run))

    @cached_property
    def thresholds(self) -> tuple[float, float]:
        """The scores of norm and loss that are excursions: `SPIKE`, or what the quiet part reaches, by half more."""
        return self._calibrated(self.norm_z), self._calibrated(self.loss_z)

    @cached_property
    def disturbed(self) -> int | None:
        """The first row at which norm or loss leaves its usual range, or is not finite; ``None`` if none does."""
        wild = self.run.bad | self.run.bad_loss | self.norm_wild | self.loss_wild
        return int(np.argmax(wild)) if wild.any() else None

    @cached_property
    def norm_wild(self) -> np.ndarray:
        """Whether the norm is an excursion: above its threshold, and at least fourfold, shape (T,)."""
        return (self.norm_z > self.thresholds[0]) & (self.norm - self.norm_level > math.log(4.0))

    @cached_property
    def loss_wild(self) -> np.ndarray:
        """Whether the loss is an excursion: above its threshold, and at least by a half, shape (T,)."""
        with np.errstate(invalid="ignore"):
            rise = self.loss - level(self.loss)
            return (self.loss_z > self.thresholds[1]) & (rise > math.log(1.5))

    @cached_property
    def norm_level(self) -> np.ndarray:
        """The median of the log norms before each row, NaN at the beginning, shape (T,)."""
        return level(self.norm)

    def logs(self, quantity: str, rows: slice) -> np.ndarray:
        """Return the logarithms of a quantity of all tensors in these rows, float32, NaN where unknown; (n, N)."""
        codes = self.run.codes.get(quantity)
        if codes is None:
            return np.full((len(range(*rows.indices(len(self.run)))), 0), np.nan, np.float32)
        logs = log2_of(codes[rows]) * np.float32(LN2)
        return np.where(np.isneginf(logs), np.nan, logs)

    def around(self, row: int) -> slice:
        """Return the rows before and after an event that are looked at in full."""
        return slice(max(row - BEFORE, 0), min(row + AFTER, len(self.run)))

    def scores(self, quantity: str, rows: slice) -> np.ndarray:
        """Return the robust z-scores of a quantity of all tensors, shape (n, N); 0 where unknown."""
        logs = self.logs(quantity, rows)
        return robust_z(logs, WINDOW) if logs.shape[1] else logs

    @cached_property
    def coarse(self) -> Mapping[str, np.ndarray]:
        """Quantity -> medians of the logs in up to `COARSE` equal parts of the run, shape (parts, N)."""
        edges = np.linspace(0, len(self.run), min(COARSE, max(len(self.run) // 4, 1)) + 1)
        edges = edges.astype(int)
        found = {}
        for of in self.run.codes:
            parts = [
                _median(self.logs(of, slice(*pair))) for pair in zip(edges, edges[1:], strict=False)
            ]
            found[of] = np.array(parts)
        return found

    def _calibrated(self, z: np.ndarray) -> float:
        """Return a threshold that the first third of the run, its beginning left out, does not reach.

        Its largest scores are left out: a third that itself has an excursion is not quiet.
        """
        quiet = np.sort(z[LEAST : max(len(z) // 3, min(len(z), 4 * LEAST))])
        usual = float(quiet[int(0.995 * (len(quiet) - 1))]) if quiet.size else 0.0
        return min(max(SPIKE, 1.5 * usual), 3.0 * SPIKE)


def level_before(logs: np.ndarray, row: int, window: int = WINDOW) -> tuple[np.ndarray, np.ndarray]:
    """Return median and robust spread of the finite values in the window before a row, of each column."""
    before = logs[max(row - window, 0) : row]
    median = _median(before)
    spread = 1.4826 * _median(np.abs(before - median))
    return median, np.maximum(np.nan_to_num(spread), FLOOR)


def _median(values: np.ndarray) -> np.ndarray:
    """Return the median of each column without its NaN, quickly where there are none; NaN for none at all."""
    if not values.size:
        return np.full(values.shape[1:], np.nan)
    if not np.isnan(values).any():
        return np.median(values, axis=0)
    empty = np.isnan(values).all(axis=0)
    return np.where(empty, np.nan, np.nanmedian(np.where(empty, 0.0, values), axis=0))


def _log(values: np.ndarray) -> np.ndarray:
    usable = np.isfinite(values) & (values > 0.0)
    return np.where(usable, np.log(np.where(usable, values, 1.0)), np.nan)
