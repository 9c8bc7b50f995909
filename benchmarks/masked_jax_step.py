"""What masks cost in a compiled JAX training step: Adam with `kk.jax.pruned` at 90 % beside Adam, in alternation.

A multilayer perceptron and a small convolutional network, whole steps (forward, backward, update) under ``jit`` with
donated buffers, in one process. Printed are the median and the quartiles of the ratios of paired rounds, the same for
masks that the loop applies by hand, and how long new masks take. Times are processor times, on other devices than CPUs
wall-clock times; ``XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`` keeps a CPU on one thread.

    python benchmarks/masked_jax_step.py [--rounds 25] [--batch 128]
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import karikomi as kk

SPARSITY = 0.9
RULES = {
    "masked, made once": kk.prune.OneShot(SPARSITY, step=1, only="*kernel"),
    "gradual, between masks": kk.prune.Gradual(
        SPARSITY, steps=(0, 1_000_000), every=500_000, initial=SPARSITY, only="*kernel"
    ),
    "RigL, between masks": kk.prune.RigL(
        SPARSITY, until=1_000_001, every=500_000, score="magnitude", only="*kernel"
    ),
}


# On processors that other programs share, their own time is what can be compared.
CLOCK = time.process_time if jax.default_backend() == "cpu" else time.perf_counter


def perceptron(width: int) -> tuple[Any, Callable[[Any, Any], Any], tuple[int, ...]]:
    """Return params, a forward pass and the shape of an input."""
    sizes = (784, width, width, 10)
    generator = np.random.default_rng(0)
    params = {
        f"dense_{n}": {
            "kernel": jnp.asarray(generator.normal(0, a**-0.5, (a, b)), jnp.float32),
            "bias": jnp.zeros(b),
        }
        for n, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
    }

    def forward(own: Any, inputs: Any) -> Any:
        for number, layer in enumerate(own.values()):
            inputs = inputs @ layer["kernel"] + layer["bias"]
            inputs = jax.nn.relu(inputs) if number < len(own) - 1 else inputs
        return inputs

    return params, forward, (784,)


def convolutions(width: int) -> tuple[Any, Callable[[Any, Any], Any], tuple[int, ...]]:
    """Return params, a forward pass and the shape of an input."""
    generator = np.random.default_rng(0)
    channels = (3, width, 2 * width, 4 * width)
    params = {
        f"conv_{n}": {
            "kernel": jnp.asarray(generator.normal(0, (9 * a) ** -0.5, (3, 3, a, b)), jnp.float32),
            "bias": jnp.zeros(b),
        }
        for n, (a, b) in enumerate(zip(channels, channels[1:], strict=False))
    }
    params["head"] = {"kernel": jnp.asarray(generator.normal(0, 0.1, (4 * width, 10)), jnp.float32)}

    def forward(own: Any, inputs: Any) -> Any:
        for name in [name for name in own if name.startswith("conv")]:
            inputs = jax.lax.conv_general_dilated(
                inputs,
                own[name]["kernel"],
                (2, 2),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            inputs = jax.nn.relu(inputs + own[name]["bias"])
        return inputs.mean((1, 2)) @ own["head"]["kernel"]

    return params, forward, (32, 32, 3)


def stepper(
    params: Any, forward: Any, tx: Any, batch: Any, masks: Any = None
) -> Callable[[], None]:
    """Return a compiled training step with its own state; `masks`: applied by hand in the loop."""

    def loss(own: Any) -> Any:
        logits = forward(own, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(own: Any, state: Any) -> Any:
        slopes = jax.grad(loss)(own)
        slopes = slopes if masks is None else kk.jax.masked(slopes, masks)
        updates, state = tx.update(slopes, state, own)
        own = optax.apply_updates(own, updates)
        return own if masks is None else kk.jax.masked(own, masks), state

    kept = [jax.tree.map(jnp.copy, params), tx.init(params)]

    def once() -> None:
        kept[:] = jax.block_until_ready(update(*kept))

    return once


def compare(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each step in each round, in an order that turns."""
    names = list(steps)
    for name in names:
        for _ in range(3):
            steps[name]()
    repeats = max(1, int(0.05 / max(seconds(steps[names[0]]), 1e-4)))
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
            times[name].append(seconds(steps[name], repeats))
    return times


def seconds(step: Callable[[], None], repeats: int = 1) -> float:
    """Return the mean time of a step."""
    started = CLOCK()
    for _ in range(repeats):
        step()
    return (CLOCK() - started) / repeats


def new_masks(params: Any) -> float:
    """Return how long new masks of 90 % take, all weights under one threshold."""
    rule = kk.prune.OneShot(SPARSITY, only="*kernel")
    made = jax.jit(lambda own: kk.jax.masks_at(own, rule, 0))
    once = lambda: jax.block_until_ready(made(params))  # noqa: E731
    once()
    return statistics.median(seconds(once) for _ in range(3))


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    device = jax.devices()[0]
    print(
        f"jax {jax.__version__}, optax {optax.__version__}, {device.platform} {device.device_kind}, "
        f"{platform.machine()}, {os.cpu_count()} processors, batches of {options.batch}"
    )
    print(f"{'':46} ratio   quartiles       ms")
    networks = {
        f"perceptron, width {options.width}": perceptron(options.width),
        f"convolutions, width {options.width // 16}": convolutions(options.width // 16),
    }
    for title, (params, forward, shape) in networks.items():
        generator = np.random.default_rng(1)
        batch = (
            jnp.asarray(generator.normal(size=(options.batch, *shape)), jnp.float32),
            jnp.asarray(generator.integers(0, 10, options.batch)),
        )
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        _, masks = kk.jax.prune(params, sparsity=SPARSITY, only="*kernel")
        adam = functools.partial(optax.adam, 1e-3)
        steps = {
            "unmasked": stepper(params, forward, adam(), batch),
            "masks by hand": stepper(params, forward, adam(), batch, masks),
            "masks that stay": stepper(params, forward, kk.jax.pruned(adam(), masks), batch),
        }
        for name, rule in RULES.items():
            steps[name] = stepper(params, forward, kk.jax.pruned(adam(), rule), batch)
        times = compare(steps, options.rounds)
        print(f"{title}, {size:,} weights: {1e3 * statistics.median(times['unmasked']):.2f} ms")
        for name in list(steps)[1:]:
            pairs = zip(times[name], times["unmasked"], strict=True)
            low, middle, high = statistics.quantiles([own / plain for own, plain in pairs], n=4)
            print(
                f"  {name:44} {middle:5.3f}   {low:.3f} to {high:.3f}  "
                f"{1e3 * statistics.median(times[name]):7.2f}"
            )
        print(f"  {'new masks, one threshold':44} {'':5}   {'':14}  {1e3 * new_masks(params):7.2f}")


if __name__ == "__main__":
    main()
