"""Keras `fit` with gradients clipped, weights bounded and every step recorded, on TensorFlow, JAX or torch.

Trains on scikit-learn's digits, with one NaN image and one far too bright and mislabelled image, once with
plain Adam and once with clipping, and prints both accuracies. About ten seconds; KERAS_BACKEND selects the backend.
"""

from __future__ import annotations

import keras
import numpy as np
from sklearn.datasets import load_digits

import karikomi as kk

EPOCHS, BATCH, RATE = 12, 64, 6e-3


def digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return training inputs and classes, two of them corrupted, and 400 others for testing."""
    pixels, classes = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(pixels))
    pixels, classes = pixels[order].astype(np.float32) / 16, classes[order]
    pixels[500], pixels[1000], classes[1000] = np.nan, 1e3 * pixels[1000], 9 - classes[1000]
    return (pixels[400:], classes[400:]), (pixels[:400], classes[:400])


def accuracy(optimizer: keras.optimizers.Optimizer, *callbacks: keras.callbacks.Callback) -> float:
    """Return the test accuracy of a network after training with an optimizer."""
    keras.utils.set_random_seed(0)
    hidden = keras.layers.Dense(64, "relu", name="hidden")
    model = keras.Sequential([keras.Input((64,)), hidden, keras.layers.Dense(10, name="classes")])
    kk.keras.bound_(model, kk.bound.MaxNorm(3.0))  # per unit; `fit` applies it after every step
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    train, test = digits()
    model.fit(*train, BATCH, EPOCHS, verbose=0, callbacks=list(callbacks))
    return model.evaluate(*test, verbose=0)[1]


def main() -> None:
    """Print the accuracy with and without clipping, and the clipped and skipped steps."""
    page = kk.report.TrainingPage("runs/digits.html")
    monitor = kk.keras.Monitor("runs/digits.jsonl", report=page)
    clipped = kk.keras.clipped(keras.optimizers.Adam(RATE), kk.clip.AutoClip(75))
    print(f"plain Adam:    {accuracy(keras.optimizers.Adam(RATE)):.1%} of the test images right")
    print(f"with AutoClip: {accuracy(clipped, monitor):.1%}; its steps: runs/digits.html")
    print(*monitor.summary, sep="\n")


if __name__ == "__main__":
    main()
