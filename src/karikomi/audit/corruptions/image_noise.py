"""Noise on images: Gaussian, shot, impulse, speckle; the strengths of CIFAR-10-C."""

from __future__ import annotations

import numpy as np

from karikomi.registry import register

SOURCE = "Hendrycks and Dietterich 2019, CIFAR-10-C"


@register(
    "corruption",
    name="gaussian_noise",
    formula="x + s z, s = 0.04 0.06 0.08 0.09 0.10, z standard normal",
    source=SOURCE,
)
class GaussianNoise:
    """`gaussian_noise`."""

    modality = "image"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted images."""
        sigma = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1]
        return np.clip(inputs + sigma * generator.standard_normal(inputs.shape), 0.0, 1.0)


@register(
    "corruption",
    name="shot_noise",
    formula="Poisson(c x) / c, c = 500 250 100 75 50",
    source=SOURCE,
)
class ShotNoise:
    """`shot_noise`."""

    modality = "image"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted images."""
        count = (500, 250, 100, 75, 50)[severity - 1]
        return np.clip(generator.poisson(inputs * count) / count, 0.0, 1.0)


@register(
    "corruption",
    name="impulse_noise",
    formula="0 or 1 for a share of 0.01 0.02 0.03 0.05 0.07 of the values",
    source=SOURCE,
)
class ImpulseNoise:
    """`impulse_noise`: salt and pepper."""

    modality = "image"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted images."""
        share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
        hit, salt = generator.random(inputs.shape) < share, generator.random(inputs.shape) < 0.5
        return np.where(hit, salt.astype(np.float64), inputs)


@register(
    "corruption",
    name="speckle_noise",
    formula="x + s x z, s = 0.06 0.10 0.12 0.16 0.20, z standard normal",
    source=SOURCE,
)
class SpeckleNoise:
    """`speckle_noise`."""

    modality = "image"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted images."""
        sigma = (0.06, 0.10, 0.12, 0.16, 0.20)[severity - 1]
        return np.clip(inputs + sigma * inputs * generator.standard_normal(inputs.shape), 0.0, 1.0)
