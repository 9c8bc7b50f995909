"""What a step with niwaki's global-norm clip costs beside the framework's own clip, compiled, in one run.

optax: ``chain(clip, optimizer)`` under ``jit`` against ``optax.clip_by_global_norm``. TensorFlow: a ``tf.function`` against
``tf.clip_by_global_norm``. Keras: one whole ``optimizer.apply``, compiled, on TensorFlow, JAX and torch against
``global_clipnorm``. Rounds alternate between the two; what is printed is the median of the ratios of
rounds, and the median times. Ours also measures every tensor, keeps a state and skips bad steps.

    python benchmarks/clip_frameworks.py [--rounds 15]
"""

from __future__ import annotations

import argparse
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

    import niwaki as nw

    rule = nw.clip.ByGlobalNorm(1.0)

    def step(tx: Any, params: list) -> Step:
        @jax.jit
        def update(grads: Any, state: Any, params: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        return lambda: jax.block_until_ready(update(params, state, params))

    for size, shape in SIZES.items():
        params = [jax.numpy.asarray(array) for array in arrays(*shape)]
        for name, inner in (("sgd", optax.sgd(0.1)), ("adamw", optax.adamw(1e-3))):
            own = optax.clip_by_global_norm(1.0)
            theirs = step(optax.chain(own, inner), params)
            ours = step(optax.chain(nw.jax.clip(rule), inner), params)
            compare(f"optax, clip + {name}, {size}", theirs, ours, rounds)
        compare(
            f"optax, clipped(adamw), {size}",
            theirs,
            step(nw.jax.clipped(optax.adamw(1e-3), rule), params),
            rounds,
        )


def tensorflow_lane(rounds: int) -> None:
    """Time a compiled clip by itself, and one followed by plain SGD."""
    import tensorflow as tf

    import niwaki as nw

    rule = nw.clip.ByGlobalNorm(1.0)
    for size, shape in SIZES.items():
        grads = [tf.constant(array) for array in arrays(*shape)]
        weights = [tf.Variable(grad) for grad in grads]
        state = nw.keras.initial_state(rule, weights)

        def descend(clipped: Any, weights: list = weights) -> None:
            for weight, grad in zip(weights, clipped, strict=True):
                weight.assign_sub(0.1 * grad)

        own = tf.function(lambda g: tf.clip_by_global_norm(g, 1.0))
        ours = tf.function(lambda g, s: nw.keras.clip(g, rule, s)[::2])
        own_step = tf.function(lambda g: descend(tf.clip_by_global_norm(g, 1.0)[0]))  # noqa: B023

        @tf.function
        def our_step(grads: Any, state: Any, weights: list = weights) -> Any:
            clipped, _, state = nw.keras.clip(grads, rule, state)
            for weight, grad in zip(weights, clipped, strict=True):
                weight.assign_sub(0.1 * grad)
            return state

        named = nw.keras.initial_state(rule, grads)
        compare(
            f"tf.function, clip, {size}", lambda: own(grads), lambda: ours(grads, named), rounds
        )  # noqa: B023
        compare(
            f"tf.function, clip + sgd, {size}",
            lambda: own_step(grads),  # noqa: B023
            lambda: our_step(grads, named),  # noqa: B023
            rounds,
        )
        del state


def keras_lane(rounds: int) -> None:
    """Time one whole step of Adam, compiled where the backend compiles."""
    import keras

    import niwaki as nw

    backend = keras.config.backend()
    for size, shape in SIZES.items():
        both = (
            keras.optimizers.Adam(1e-3, global_clipnorm=1.0),
            nw.keras.clipped(keras.optimizers.Adam(1e-3), nw.clip.ByGlobalNorm(1.0)),
        )
        steps = [_keras_step(optimizer, arrays(*shape), backend) for optimizer in both]
        compare(f"Keras on {backend}, Adam, {size}", *steps, rounds)


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

    step = jax.jit(optimizer.stateless_apply)
    own = [variable.value for variable in optimizer.variables]
    weights = [variable.value for variable in variables]
    return lambda: jax.block_until_ready(step(own, grads, weights))


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
