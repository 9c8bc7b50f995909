"""Prune a Keras model to 90 % during `fit`, stop in the middle, resume from the file, and save the masks.

Trains on scikit-learn's digits with clipping and a penalty, and prints accuracies and the account. About ten seconds;
KERAS_BACKEND selects the backend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits

import karikomi as kk

EPOCHS, STOP, BATCH = 20, 8, 64
SCHEDULE = kk.prune.Gradual(0.9, steps=(50, 300), every=25)


def digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return training images and classes, and 400 others for testing."""
    pixels, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    pixels, classes = pixels[order].astype(np.float32) / 16, classes[order]
    return (pixels[400:], classes[400:]), (pixels[:400], classes[:400])


def network() -> keras.Model:
    """Return a network with an L1 penalty on its hidden layer, and gradients clipped."""
    keras.utils.set_random_seed(0)
    penalty = kk.keras.Penalty(kk.prune.L1(1e-5))
    hidden = keras.layers.Dense(128, "relu", kernel_regularizer=penalty, name="hidden")
    model = keras.Sequential([keras.Input((64,)), hidden, keras.layers.Dense(10, name="classes")])
    optimizer = kk.keras.clipped(keras.optimizers.Adam(3e-3), kk.clip.AutoClip(75))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def main() -> None:
    """Train dense, then pruned with an interruption; print accuracies and sizes."""
    train, test = digits()
    dense = network()
    dense.fit(*train, BATCH, EPOCHS, verbose=0)
    print(f"dense:  {dense.evaluate(*test, verbose=0)[1]:.1%} right")

    folder = Path("runs")
    folder.mkdir(exist_ok=True)
    begun = network()
    begun.fit(*train, BATCH, STOP, verbose=0, callbacks=[kk.keras.Pruning(SCHEDULE)])
    begun.save(folder / "half-way.keras")

    model: Any = keras.models.load_model(folder / "half-way.keras")
    pruning = kk.keras.Pruning(SCHEDULE)
    model.fit(*train, BATCH, EPOCHS, initial_epoch=STOP, verbose=0, callbacks=[pruning])
    right = model.evaluate(*test, verbose=0)[1]
    print(f"pruned: {right:.1%} right, {pruning.masks.sparsity:.1%} of the kernels zero")
    print(pruning.masks.account)

    pruning.masks.save(folder / "masks.safetensors")
    print(f"masks:  {(folder / 'masks.safetensors').stat().st_size:,} bytes")
    kk.keras.strip_(model)
    model.save(folder / "digits.keras")  # the zeros are saved, the masks are not


if __name__ == "__main__":
    main()
