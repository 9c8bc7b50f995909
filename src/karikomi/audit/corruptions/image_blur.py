"""Loss of detail in images: Gaussian and defocus blur, pixelation."""

from __future__ import annotations

import numpy as np

from karikomi.registry import register

SOURCE = "Hendrycks and Dietterich 2019, CIFAR-10-C"


@register(
    "corruption",
    name="gaussian_blur",
    formula="convolution with a Gaussian of deviation 0.4 0.6 0.7 0.8 1.0 pixels",
    source=SOURCE,
)
class GaussianBlur:
    """`gaussian_blur`."""

    modality = "image"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted images."""
        return _filtered(inputs, _gaussian((0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]))


@register(
    "corruption",
    name="defocus_blur",
    formula="convolution with a disk of radius 0.3 0.4 0.5 1.0 1.5 pixels, smoothed by 0.4 0.5 0.6 0.2 0.1",
    source=SOURCE,
)
class DefocusBlur:
    """`defocus_blur`."""

    modality = "image"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted images."""
        radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity - 1]
        places = np.arange(-8, 9)
        disk = (places[:, None] ** 2 + places**2 <= radius**2).astype(np.float64)
        return _filtered(inputs, _convolved(disk / disk.sum(), _gaussian(alias)))


@register(
    "corruption",
    name="pixelate",
    formula="means over boxes: 0.95 0.90 0.85 0.75 0.65 of the pixels per side",
    source=SOURCE,
)
class Pixelate:
    """`pixelate`."""

    modality = "image"

    def corrupt(
        self, inputs: np.ndarray, severity: int, generator: np.random.Generator
    ) -> np.ndarray:
        """Return corrupted images."""
        share = (0.95, 0.90, 0.85, 0.75, 0.65)[severity - 1]
        for axis in (1, 2):
            size = inputs.shape[axis]
            few = max(int(size * share), 1)
            inputs = np.moveaxis(np.moveaxis(inputs, axis, -1) @ _boxes(size, few), -1, axis)
        return inputs


def _gaussian(sigma: float) -> np.ndarray:
    """Return a filter of (9, 9) or more that sums to 1."""
    radius = max(int(4 * sigma + 0.5), 1)
    row = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    row /= row.sum()
    return row[:, None] * row


def _convolved(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    size = first.shape[0] + second.shape[0] - 1
    product = np.fft.rfft2(first, (size, size)) * np.fft.rfft2(second, (size, size))
    return np.fft.irfft2(product, (size, size))


def _filtered(images: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Return images convolved with an odd, symmetric filter; the borders are mirrored."""
    radius = min(kernel.shape[0] // 2, *(size for size in images.shape[1:3]))
    middle = kernel.shape[0] // 2
    kernel = kernel[middle - radius : middle + radius + 1, middle - radius : middle + radius + 1]
    around = ((0, 0), (radius, radius), (radius, radius), (0, 0))
    wide = np.pad(images, around, mode="symmetric")
    out = np.zeros_like(images)
    height, width = images.shape[1:3]
    for row, column in zip(*np.nonzero(kernel > 1e-8), strict=True):
        part = wide[:, row : row + height, column : column + width]
        out += kernel[row, column] * part
    return np.clip(out / kernel.sum(), 0.0, 1.0)


def _boxes(size: int, few: int) -> np.ndarray:
    """Return the matrix (size, size) that averages over `few` boxes and spreads each mean over its pixels."""
    edges = np.linspace(0, size, few + 1)
    low, high = np.arange(size), np.arange(1, size + 1)
    overlap = np.clip(
        np.minimum(high[:, None], edges[1:]) - np.maximum(low[:, None], edges[:-1]), 0.0, None
    )
    box = np.minimum((np.arange(size) + 0.5) * few // size, few - 1).astype(int)
    return (overlap / overlap.sum(0))[:, box]
