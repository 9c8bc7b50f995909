"""What a step with karikomi's global-norm clip costs beside the framework's own clip, compiled, in one run.

optax: ``chain(clip, optimizer)`` under ``jit`` against ``optax.clip_by_global_norm``. TensorFlow: a ``tf.function``
against ``tf.clip_by_global_norm``. Keras: one whole ``optimizer.apply``, compiled, on TensorFlow, JAX and torch against
``global_clipnorm``. Rounds alternate between the two; printed are the median of the ratios of
rounds, and the median times. Ours also measures every tensor, keeps a state and skips non-finite steps.

    python benchmarks/clip_frameworks.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SIZES = {"12 x 1024^2": (12, 1024), "60 x 256^2": (60, 256), "100 x 32^2": (100, 32)}
LANES = ("optax", "tensorflow", "keras-tensorflow", "keras-jax", "keras-torch")
Step = Callable[[], Any]


def arrays(count: int, width: int) -> list[np.ndarray]:
    """Return kernels and biases with noise."""
    generator = np.random.default_rng(0)
    shapes = [shape for _ in range(count) for shape in ((width, width), (width,))]
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


def compare(title: str, theirs: Step, ours: Step, rounds: int) -> None:
    """Print the median ratio of paired rounds."""
    times: dict[Step, list[float]] = {theirs: [], ours: []}
    for step in times:
        step()
    repeats = max(1, int(0.03 / _seconds(theirs)))
    for turn in range(rounds):
        for step in (theirs, ours) if turn % 2 else (ours, theirs):
            start = time.perf_counter()
            for _ in range(repeats):
                step()
            times[step].append((time.perf_counter() - start) / repeats)
    ratios = [own / other for own, other in zip(times[ours], times[theirs], strict=True)]
    both = [1e3 * statistics.median(times[step]) for step in (theirs, ours)]
    print(
        f"{title:44} {statistics.median(ratios):6.2f}   {both[1]:8.2f} ms against {both[0]:8.2f} ms",
        flush=True,
    )


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return max(time.perf_counter() - start, 1e-4)


def optax_lane(rounds: int) -> None:
    """Time the transform before SGD and AdamW, and `clipped` around AdamW."""
    import jax
    import optax

    import karikomi as kk

    rule = kk.clip.ByGlobalNorm(1.0)

    def step(tx: Any, params: list) -> Step:
        # Donated in the order of the results; otherwise XLA assigns buffers to other arrays and copies.
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        kept = [jax.tree.map(jax.numpy.copy, params), tx.init(params)]

        def once() -> None:
            kept[:] = jax.block_until_ready(update(*kept, params))

        return once

    for size, shape in SIZES.items():
        params = [jax.numpy.asarray(array) for array in arrays(*shape)]
        for name, inner in (("sgd", optax.sgd(0.1)), ("adamw", optax.adamw(1e-3))):
            own = optax.clip_by_global_norm(1.0)
            theirs = step(optax.chain(own, inner), params)
            ours = step(optax.chain(kk.jax.clip(rule), inner), params)
            compare(f"optax, clip + {name}, {size}", theirs, ours, rounds)
        # `clipped` skips non-finite steps, so it is compared with a transform that skips them too.
        chain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
        theirs = step(optax.apply_if_finite(chain, 10), params)
        ours = step(kk.jax.clipped(optax.adamw(1e-3), rule), params)
        compare(f"optax, clipped, apply_if_finite, {size}", theirs, ours, rounds)


def tensorflow_lane(rounds: int) -> None:
    """Time a compiled clip by itself, and a whole step of training with SGD."""
    for size, shape in SIZES.items():
        _clip_alone(size, arrays(*shape), rounds)
        _training_step(size, arrays(*shape), rounds)


def _clip_alone(size: str, values: list[np.ndarray], rounds: int) -> None:
    import tensorflow as tf

    import karikomi as kk

    rule, grads = kk.clip.ByGlobalNorm(1.0), [tf.constant(value) for value in values]
    for name, options in (("graph", {}), ("XLA", {"jit_compile": True})):
        own = tf.function(lambda g: tf.clip_by_global_norm(g, 1.0), **options)
        ours = tf.function(lambda g, s: kk.keras.clip(g, rule, s)[::2], **options)
        state = kk.keras.initial_state(rule, grads)
        compare(
            f"TensorFlow, clip alone, {name}, {size}",
            functools.partial(own, grads),
            functools.partial(ours, grads, state),
            rounds,
        )


def _training_step(size: str, values: list[np.ndarray], rounds: int) -> None:
    import tensorflow as tf

    import karikomi as kk

    rule = kk.clip.ByGlobalNorm(1.0)
    weights = [tf.Variable(value * np.float32(value.shape[-1] ** -0.5)) for value in values]
    inputs = tf.constant(np.ones((32, values[0].shape[0]), np.float32))
    state = kk.keras.initial_state(rule, weights)

    def gradients() -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            hidden = inputs
            for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
                hidden = tf.tanh(hidden @ kernel + bias)
            loss = tf.reduce_mean(hidden)
        return tape.gradient(loss, weights)

    def descend(grads: list[tf.Tensor]) -> None:
        for weight, grad in zip(weights, grads, strict=True):
            weight.assign_sub(1e-6 * grad)

    @tf.function
    def theirs() -> None:
        descend(tf.clip_by_global_norm(gradients(), 1.0)[0])

    @tf.function
    def ours(state: dict) -> dict:
        grads, _, state = kk.keras.clip(gradients(), rule, state, variables=weights)
        descend(grads)
        return state

    compare(
        f"TensorFlow, training step, graph, {size}",
        theirs,
        functools.partial(ours, state),
        rounds,
    )


def keras_lane(rounds: int) -> None:
    """Time one whole step of Adam, compiled where the backend compiles."""
    import keras

    import karikomi as kk

    backend = keras.config.backend()
    for size, shape in SIZES.items():
        both = (
            keras.optimizers.Adam(1e-3, global_clipnorm=1.0),
            kk.keras.clipped(keras.optimizers.Adam(1e-3), kk.clip.ByGlobalNorm(1.0)),
        )
        steps = [_keras_step(optimizer, arrays(*shape), backend) for optimizer in both]
        compare(f"Keras on {backend}, Adam alone, {size}", *steps, rounds)
        fits = [
            _keras_fit(type(optimizer).from_config(optimizer.get_config()), *shape)
            for optimizer in both
        ]
        compare(f"Keras on {backend}, fit, {size}", *fits, rounds)


def _keras_step(optimizer: Any, values: list[np.ndarray], backend: str) -> Step:
    import keras

    variables = [keras.Variable(value) for value in values]
    grads = [keras.ops.convert_to_tensor(value) for value in values]
    optimizer.build(variables)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda: optimizer.apply(grads, variables), autograph=False)
    if backend == "torch":
        return lambda: optimizer.apply(grads, variables)
    import jax

    # The inputs are donated, as in Keras' own training.
    apply = lambda weights, own, grads: optimizer.stateless_apply(own, grads, weights)  # noqa: E731
    step = jax.jit(apply, donate_argnums=(0, 1))
    kept = [[variable.value + 0 for variable in v] for v in (variables, optimizer.variables)]

    def once() -> None:
        kept[:] = jax.block_until_ready(step(*kept, grads))

    return once


def _keras_fit(optimizer: Any, layers: int, width: int) -> Step:
    import keras

    inputs = keras.Input((width,))
    hidden = inputs
    for _ in range(layers):
        hidden = keras.layers.Dense(width, "tanh")(hidden)
    model = keras.Model(inputs, hidden)
    model.compile(optimizer, "mse")
    batch = np.random.default_rng(0).normal(size=(4 * 64, width)).astype(np.float32)
    return lambda: model.fit(batch, batch, batch_size=64, verbose=0)


def main() -> None:
    """Run one lane, or all of them, each in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--lane", choices=LANES)
    given = parser.parse_args()
    if given.lane is None:
        print(f"{'':44}  ratio   ours against the framework's own")
        for lane in LANES:
            command = [sys.executable, __file__, "--rounds", str(given.rounds), "--lane", lane]
            backend = lane.removeprefix("keras-") if lane.startswith("keras-") else "tensorflow"
            quiet = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
            subprocess.run(command, env={**os.environ, **quiet}, check=True)
    elif given.lane.startswith("keras-"):
        keras_lane(given.rounds)
    else:
        {"optax": optax_lane, "tensorflow": tensorflow_lane}[given.lane](given.rounds)


if __name__ == "__main__":
    main()
