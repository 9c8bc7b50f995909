"""Figures behind the advice, each worked out in another way on a few rows."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from karikomi.advising.causes.moment_lag import _ratios
from karikomi.advising.detection import LEAST
from karikomi.advising.signals import Signals, level_before


def test_the_level_before_a_row_has_nothing_of_the_row() -> None:
    logs = np.array([[1.0, 0.0], [2.0, 0.5], [4.0, 0.0], [100.0, 9.0], [7.0, 7.0]])
    median, spread = level_before(logs, 3)
    assert median.tolist() == [2.0, 0.0] and spread[0] == pytest.approx(1.4826)
    assert level_before(logs, 3, window=2)[0].tolist() == [3.0, 0.25]


class Taken:
    """Logs of one tensor's norms, with the steps that the optimizer did not take."""

    def __init__(self, logs: np.ndarray, skipped: list[int], bad: list[int]) -> None:
        places, self.disturbed, self._logs = np.arange(len(logs)), None, logs
        self.skipped, self.bad = np.isin(places, skipped), np.isin(places, bad)
        self.run: Any = self

    def __len__(self) -> int:
        return len(self._logs)

    def logs(self, quantity: str, rows: slice) -> np.ndarray:
        assert quantity == "gradients"
        return self._logs[rows]


def test_squares_are_compared_with_the_corrected_mean_of_the_steps_that_were_taken() -> None:
    norms = np.exp(np.random.default_rng(0).normal(size=(2 * LEAST, 1)))
    norms[[5, 9]] = 1e3
    signals = Taken(np.log(norms), skipped=[5], bad=[9])
    found = _ratios(cast(Signals, signals), 0.9)
    assert found is not None and np.isnan(found[0]).all()
    for t in (1, 6, 10, 2 * LEAST - 1):
        before = [k for k in range(t) if k not in (5, 9)]
        weights = np.array([0.9 ** (len(before) - 1 - place) for place in range(len(before))])
        mean = np.average(norms[before, 0] ** 2, weights=weights)  # what the correction makes of it
        assert found[t, 0] == pytest.approx(np.log(norms[t, 0] ** 2 / mean))
