"""What TensorFlow's weight clustering makes of kernels before it trains, in plain NumPy, under its names.

Read from the toolkit's code of 2024 (clustering_centroids.py): centroids, then the nearest for each weight.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

Centroids = Callable[[np.ndarray, int], np.ndarray]


def _linear(weights: np.ndarray, count: int) -> np.ndarray:
    return (
        np.linspace(weights.min(), weights.max(), count) if weights.size and count else weights[:0]
    )


def _random(weights: np.ndarray, count: int) -> np.ndarray:
    return np.random.default_rng(9).uniform(weights.min(), weights.max(), count)


def _density(weights: np.ndarray, count: int) -> np.ndarray:
    grid = np.linspace(weights.min() - 0.01, weights.max() + 0.01, 30)
    shares = (weights.reshape(-1, 1) <= grid).mean(0)
    return grid[np.minimum(np.searchsorted(shares, np.linspace(0.01, 1, count), "right"), 29)]


def _plus_plus(weights: np.ndarray, count: int) -> np.ndarray:
    chosen = [float(weights.flat[0])]
    while len(chosen) < count:
        apart = np.abs(weights.reshape(-1, 1) - np.array(chosen)).min(1)
        chosen.append(float(weights.flat[int(apart.argmax())]))
    return np.array(chosen)


Start = SimpleNamespace(
    LINEAR=_linear, RANDOM=_random, DENSITY_BASED=_density, KMEANS_PLUS_PLUS=_plus_plus
)


def _around_zero(weights: np.ndarray, count: int, start: Centroids) -> np.ndarray:
    below, above = weights[weights < 0], weights[weights > 0]
    lower = round((count - 1) * below.size / (below.size + above.size))
    return np.concatenate([start(below, lower), [0.0], start(above, count - 1 - lower)])


def cluster_weights(
    to_cluster: Any, number: int, start: Centroids, preserve_sparsity: bool = False
) -> dict[str, np.ndarray]:
    """Return path -> kernel."""
    found = {}
    for variable in to_cluster.trainable_variables:
        if not variable.path.endswith("kernel"):
            continue
        kernel = np.asarray(variable.numpy())
        made = start(kernel, number)
        if preserve_sparsity:
            made = _around_zero(kernel, number, start)
        made = np.sort(made.astype(kernel.dtype))
        found[variable.path] = made[np.abs(kernel[..., None] - made).argmin(-1)]
    return found


clustering = SimpleNamespace(
    cluster_weights=cluster_weights,
    strip_clustering=lambda clustered: clustered,
    experimental=SimpleNamespace(cluster_weights=cluster_weights),
)
