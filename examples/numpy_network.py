"""A network in plain NumPy: forward, gradients by hand, clip, update, bound, prune, quantize, save.

Trains on scikit-learn's digits twice from the same seed, once dense and once pruned to 90 % on the way, and
prints the accuracy on 400 other digits (one is 0.25 %) and the bytes of a real file. About eight seconds.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import karikomi as kk
from karikomi.quantize import kmeans, uniform
from karikomi.tree import flatten, unflatten

WIDTHS, STEPS, BATCH, RATE = (64, 128, 64, 10), 2_400, 32, 0.4
CLIP = kk.clip.AutoClip(90)  # the limit is the 90th percentile of the gradient norms so far
BOUND = kk.bound.Clamp(0.5)  # all weights within +-0.5, so that a grid of few bits is fine enough
PRUNE = kk.prune.Gradual(0.9, steps=(600, 1_800), every=25)

Layers = list[dict[str, np.ndarray]]


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return training inputs and classes, and 400 others for testing."""
    pixels, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    pixels, classes = pixels[order].astype(np.float32) / 16, classes[order]
    return pixels[400:], classes[400:], pixels[:400], classes[:400]


def fresh(seed: int) -> Layers:
    """Return a network: one dict of weight (out, in) and bias per layer."""
    rng = np.random.default_rng(seed)
    layers = []
    for into, out in itertools.pairwise(WIDTHS):
        weight = rng.normal(size=(out, into)) * np.sqrt(2 / into)
        layers.append({"weight": weight.astype(np.float32), "bias": np.zeros(out, np.float32)})
    return layers


def forward(layers: Layers, inputs: np.ndarray) -> list[np.ndarray]:
    """Return the inputs of each layer, and as the last item the logits."""
    seen = [inputs]
    for layer in layers[:-1]:
        seen.append(np.maximum(seen[-1] @ layer["weight"].T + layer["bias"], 0))
    return [*seen, seen[-1] @ layers[-1]["weight"].T + layers[-1]["bias"]]


def gradients(layers: Layers, inputs: np.ndarray, classes: np.ndarray) -> Layers:
    """Return the gradients of the mean cross-entropy, by backpropagation from the logits."""
    *seen, logits = forward(layers, inputs)
    error = np.exp(logits - logits.max(axis=1, keepdims=True))
    error /= error.sum(axis=1, keepdims=True)
    error[np.arange(len(classes)), classes] -= 1
    error /= len(classes)
    found: Layers = []
    for layer, entered in zip(layers[::-1], seen[::-1], strict=True):
        found.append({"weight": error.T @ entered, "bias": error.sum(axis=0)})
        error = (error @ layer["weight"]) * (entered > 0)
    return found[::-1]


def trained(inputs: np.ndarray, classes: np.ndarray, prune: kk.prune.Gradual | None) -> Layers:
    """Return a network after all steps, each of which clips, updates, masks and bounds."""
    layers, state, masks, rng = fresh(seed=0), None, {}, np.random.default_rng(1)
    for step in range(STEPS):
        batch = rng.integers(len(inputs), size=BATCH)
        grads = gradients(layers, inputs[batch], classes[batch])
        grads, _, state = kk.numpy.clip(grads, CLIP, state)
        layers = [
            {name: layer[name] - RATE * own[name] for name in layer}
            for layer, own in zip(layers, grads, strict=True)
        ]
        if prune and prune.due(step):
            goal = prune.sparsity_at(step)
            layers, masks = kk.numpy.prune(layers, sparsity=goal, only="*.weight", masks=masks)
        layers = kk.numpy.masked(layers, masks)  # pruned weights stay zero
        layers, _, _ = kk.numpy.bound(layers, BOUND)
    return layers


def as_stored(layers: Layers, quantize: Callable[..., Any] | None) -> tuple[Layers, int]:
    """Return the network after packing and loading, and the size of the file in bytes."""
    arrays = flatten(layers)
    if quantize:
        arrays |= {n: quantize(array) for n, array in arrays.items() if n.endswith("weight")}
    with tempfile.TemporaryDirectory() as folder:
        path = kk.save(arrays, Path(folder) / "digits.karikomi")
        return unflatten(layers, kk.load(path)), path.stat().st_size


def main() -> None:
    """Print the table."""
    inputs, classes, test_inputs, test_classes = digits()
    dense, sparse = trained(inputs, classes, None), trained(inputs, classes, PRUNE)
    stages = {
        "dense": (dense, None),
        "dense, 8 bits": (dense, uniform),
        "pruned": (sparse, None),
        "pruned, 8 bits": (sparse, uniform),
        "pruned, 16 values": (sparse, kmeans),
    }
    raw = sum(array.nbytes for array in flatten(dense).values())
    print(f"in memory: {raw:,} bytes   zero %   test accuracy %   file bytes   smaller")
    for name, (layers, quantize) in stages.items():
        layers, size = as_stored(layers, quantize)
        zeros = np.mean(np.concatenate([layer["weight"].ravel() for layer in layers]) == 0)
        right = np.mean(forward(layers, test_inputs)[-1].argmax(axis=1) == test_classes)
        print(f"{name:23}{100 * zeros:9.1f}{100 * right:18.2f}{size:13,}{raw / size:9.1f}x")


if __name__ == "__main__":
    main()
