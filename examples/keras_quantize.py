"""Prune and quantize a Keras network for digits, save it in a packed file, and load it into a fresh model.

Trains on scikit-learn's digits, and prints accuracies and bytes for several widths, rounded to the nearest value and
with compensated errors. About fifteen seconds; KERAS_BACKEND selects the backend.
"""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_digits

import karikomi as kk

EPOCHS, WIDTHS = 8, (8, 4, 3)


def digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return training images and classes, and 400 others for testing."""
    pixels, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    pixels, classes = pixels[order].astype(np.float32).reshape(-1, 8, 8, 1) / 16, classes[order]
    return (pixels[400:], classes[400:]), (pixels[:400], classes[:400])


def network() -> keras.Model:
    """Return a small convolutional network."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, strides=2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, "relu"),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    return model


def main() -> None:
    """Train, prune, and quantize copies at several widths."""
    train, test = digits()
    model = network()
    pruning = kk.keras.Pruning(kk.prune.Gradual(0.6, steps=(40, 120), every=10))
    model.fit(*train, 64, EPOCHS, verbose=0, callbacks=[pruning])
    kk.keras.strip_(model)
    weights = kk.keras.to_arrays(model)
    dense = sum(array.nbytes for array in weights.values())
    print(f"float32, 60 % pruned: {model.evaluate(*test, verbose=0)[1]:.1%} right, {dense:,} bytes")

    folder = Path("runs")
    folder.mkdir(exist_ok=True)
    images = [train[0][start : start + 128] for start in range(0, 512, 128)]
    for bits in WIDTHS:
        for method in ("uniform", "gptq"):
            kk.keras.fill_(model, weights)
            kk.keras.quantize_(model, bits=bits, method=method, data=images, progress=False)
            path = kk.save(model, folder / "digits.karikomi")
            loaded = kk.load(path, into=network())
            right, size = loaded.evaluate(*test, verbose=0)[1], path.stat().st_size
            print(
                f"{bits} bits, {method:7}: {right:.1%} right, {size:,} bytes ({dense / size:.1f}x)"
            )


if __name__ == "__main__":
    main()
