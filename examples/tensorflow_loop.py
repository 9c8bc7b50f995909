"""TensorFlow: a custom loop around a tape, SGD, gradients clipped by their global norm.

`clip` is a pure function: its state is an argument and a result of the compiled step. Real digits, a few
seconds.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import karikomi as kk

DIGITS = load_digits()
IMAGES, LABELS = tf.constant(DIGITS.data / 16, tf.float32), tf.constant(DIGITS.target, tf.int32)
TRAIN, TEST = 1_400, 397
RATE = 0.5


def network() -> list[tf.Variable]:
    """Return the weights of five layers."""
    tf.random.set_seed(0)
    sizes, weights = [64, 64, 64, 64, 64, 10], []
    for place, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        scale = (2.0 / inputs) ** 0.5
        kernel = tf.random.normal((inputs, outputs), stddev=scale)
        weights += [
            tf.Variable(kernel, name=f"layer{place}_kernel"),
            tf.Variable(tf.zeros(outputs), name=f"layer{place}_bias"),
        ]
    return weights


def logits(weights: list[tf.Variable], images: tf.Tensor) -> tf.Tensor:
    """Return one row of ten numbers per image."""
    for kernel, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        images = tf.nn.relu(images @ kernel + bias)
    return images @ weights[-2] + weights[-1]


def train(rule: object) -> None:
    """Train for ten epochs and print the accuracy and the share of clipped steps."""
    weights = network()

    @tf.function
    def step(images: tf.Tensor, labels: tf.Tensor, state: dict) -> dict:
        with tf.GradientTape() as tape:
            found = logits(weights, images)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, found)
            loss = tf.reduce_mean(losses)
        grads = tape.gradient(loss, weights)
        grads, _, state = kk.keras.clip(grads, rule, state, variables=weights)
        for weight, grad in zip(weights, grads, strict=True):
            weight.assign_sub(RATE * grad)
        return state

    state, clipped, steps = kk.keras.initial_state(rule, weights), 0, 0
    for epoch in range(10):
        for batch in np.random.default_rng(epoch).permutation(TRAIN).reshape(-1, 50):
            state = step(tf.gather(IMAGES, batch), tf.gather(LABELS, batch), state)
            clipped, steps = clipped + kk.keras.outcome(state).engaged, steps + 1
    guesses = tf.argmax(logits(weights, IMAGES[-TEST:]), 1, tf.int32)
    right = tf.reduce_mean(tf.cast(guesses == LABELS[-TEST:], tf.float32))
    print(
        f"{rule!s:24} right {100 * right:5.1f} %, clipped {100 * clipped / steps:5.1f} % of steps"
    )


def main() -> None:
    """Train without and with a limit, at a learning rate that is too large without a limit."""
    train(kk.clip.ByGlobalNorm(float("inf")))
    train(kk.clip.ByGlobalNorm(0.5))


if __name__ == "__main__":
    main()
