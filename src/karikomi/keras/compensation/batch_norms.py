"""The statistics of one batch normalisation re-estimated."""

from __future__ import annotations

from typing import Any

import numpy as np

from karikomi.keras.layers.codes import floats_of
from karikomi.prune.account import error_ratio
from karikomi.shrink.account import Refit
from karikomi.shrink.refit_outcome import is_kept


class Renorm:
    """A batch normalisation of the smaller model, what it reads on all examples, and what it should make of it."""

    def __init__(
        self, norm: Any, inputs: np.ndarray, targets: np.ndarray, held: np.ndarray
    ) -> None:
        self._norm, self._held = norm, held
        self._inputs, self._targets = inputs, targets
        self._axis = norm.axis % inputs.ndim

    def run_(self) -> Refit:
        """Take mean and variance of what is fitted, where that is better on what is held out."""
        old = [floats_of(v) for v in (self._norm.moving_mean, self._norm.moving_variance)]
        new = self._moments()
        before, after = self._error(*old), self._error(*new)
        kept = is_kept(before, after)
        if kept:
            self._norm.moving_mean.assign(new[0])
            self._norm.moving_variance.assign(new[1])
        return Refit(before, after, kept)

    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        wide = np.moveaxis(self._inputs[~self._held], self._axis, -1).astype(np.float64)
        flat = wide.reshape(-1, wide.shape[-1])
        return flat.mean(axis=0), flat.var(axis=0)

    def _error(self, mean: np.ndarray, variance: np.ndarray) -> float:
        given, expected = (
            np.moveaxis(array[self._held], self._axis, -1).astype(np.float64)
            for array in (self._inputs, self._targets)
        )
        found = (given - mean) / np.sqrt(variance + self._norm.epsilon)
        if self._norm.gamma is not None:
            found = found * floats_of(self._norm.gamma)
        if self._norm.beta is not None:
            found = found + floats_of(self._norm.beta)
        lost = float(np.square(expected - found).sum())
        return error_ratio(lost, float(np.square(expected).sum()))
