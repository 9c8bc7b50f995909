"""Light and weather in images: fog, contrast, brightness."""

from __future__ import annotations

import numpy as np

from karikomi.registry import register

SOURCE = "Hendrycks and Dietterich 2019, CIFAR-10-C"


@register(
    "corruption",
    name="fog",
    formula="(x + a f) max x / (max x + a), a = 0.2 0.5 0.75 1.0 1.5, f a plasma fractal in [0, 1]",
    source=f"{SOURCE}; deviation: the fractal is a sum of octaves of smooth noise",
)
class Fog:
    """`fog`."""

    modality = "image"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted images."""
        amount, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[severity - 1]
        most = inputs.max(axis=(1, 2, 3), keepdims=True)
        fractal = _plasma(inputs.shape[:3], decay, generator)[..., None]
        return np.clip((inputs + amount * fractal) * most / (most + amount), 0.0, 1.0)


@register(
    "corruption",
    name="contrast",
    formula="m + c (x - m), c = 0.75 0.50 0.40 0.30 0.15, m the mean of an image",
    source=SOURCE,
)
class Contrast:
    """`contrast`."""

    modality = "image"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted images."""
        share = (0.75, 0.50, 0.40, 0.30, 0.15)[severity - 1]
        mean = inputs.mean(axis=(1, 2), keepdims=True)
        return np.clip(mean + share * (inputs - mean), 0.0, 1.0)


@register(
    "corruption",
    name="brightness",
    formula="x scaled so that its largest channel grows by 0.05 0.10 0.15 0.20 0.30",
    source=SOURCE,
)
class Brightness:
    """`brightness`: the value of hue, saturation and value."""

    modality = "image"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted images."""
        more = (0.05, 0.10, 0.15, 0.20, 0.30)[severity - 1]
        value = inputs.max(axis=3, keepdims=True)
        brighter = np.clip(value + more, 0.0, 1.0)
        # Grey where there is no colour to keep.
        scaled = inputs * (brighter / np.maximum(value, 1e-12))
        return np.where(value > 0.0, scaled, brighter)


def _plasma(shape: tuple[int, ...], decay: float, generator: np.random.Generator) -> np.ndarray:
    """Return maps (n, height, width) in [0, 1]: smooth noise whose octaves weaken by `decay`."""
    number, height, width = shape
    total = np.zeros((number, height, width))
    cells, weight = 2, 1.0
    while cells <= 2 * max(height, width):
        corners = generator.random((number, cells + 1, cells + 1))
        total += weight * _between(corners, height, width)
        cells, weight = 2 * cells, weight / decay
    low = total.min(axis=(1, 2), keepdims=True)
    spread = np.ptp(total, axis=(1, 2), keepdims=True)
    return (total - low) / np.maximum(spread, 1e-12)


def _between(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return maps that are linear between their corners."""
    for axis, size in ((1, height), (2, width)):
        places = np.linspace(0.0, corners.shape[axis] - 1.0, size)
        first = np.minimum(places.astype(int), corners.shape[axis] - 2)
        share = (places - first).reshape([-1 if other == axis else 1 for other in range(3)])
        left, right = corners.take(first, axis), corners.take(first + 1, axis)
        corners = left * (1.0 - share) + right * share
    return corners
