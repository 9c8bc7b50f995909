"""Disturbances of signals and of tables of features: noise, gain, offset, lost values."""

from __future__ import annotations

import numpy as np

from karikomi.registry import register

SOURCE = "common faults of sensors; strengths as multiples of the deviation of all inputs"


@register(
    "corruption",
    name="noise",
    formula="x + s z, s = 0.05 0.1 0.2 0.3 0.4 deviations, z standard normal",
    source=SOURCE,
)
class Noise:
    """`noise`."""

    modality = "signal"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted signals."""
        sigma = (0.05, 0.1, 0.2, 0.3, 0.4)[severity - 1]
        return inputs + sigma * generator.standard_normal(inputs.shape)


@register(
    "corruption",
    name="gain",
    formula="g x, g = 0.9 0.8 0.65 0.5 0.35 or its inverse, by example",
    source=SOURCE,
)
class Gain:
    """`gain`."""

    modality = "signal"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted signals."""
        factor = (0.9, 0.8, 0.65, 0.5, 0.35)[severity - 1]
        weaker = generator.random(len(inputs)) < 0.5
        factors = np.where(weaker, factor, 1.0 / factor)
        return inputs * factors.reshape(-1, *(1,) * (inputs.ndim - 1))


@register(
    "corruption",
    name="offset",
    formula="x + d, d = 0.1 0.2 0.4 0.6 0.8 deviations up or down, by example",
    source=SOURCE,
)
class Offset:
    """`offset`."""

    modality = "signal"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted signals."""
        shift = (0.1, 0.2, 0.4, 0.6, 0.8)[severity - 1]
        up = generator.random(len(inputs)) < 0.5
        return inputs + np.where(up, shift, -shift).reshape(-1, *(1,) * (inputs.ndim - 1))


@register(
    "corruption",
    name="lost_values",
    formula="0 for a share of 0.02 0.05 0.1 0.2 0.3 of the values",
    source=SOURCE,
)
class LostValues:
    """`lost_values`."""

    modality = "signal"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted signals."""
        share = (0.02, 0.05, 0.1, 0.2, 0.3)[severity - 1]
        return np.where(generator.random(inputs.shape) < share, 0.0, inputs)
