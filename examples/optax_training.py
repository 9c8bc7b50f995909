"""JAX and optax: an adaptive clip around Adam, weights bounded, with a compiled step.

The clip's state is part of the optimizer's state: it works with `jit` and is saved in checkpoints. Real
digits, a few seconds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import karikomi as kk

DIGITS = load_digits()
IMAGES, LABELS = jnp.asarray(DIGITS.data / 16, jnp.float32), jnp.asarray(DIGITS.target)
TRAIN, TEST = slice(0, 1_400), slice(1_400, None)

OPTIMIZER = optax.chain(
    kk.jax.clipped(optax.adam(3e-3), kk.clip.AutoClip(25)),
    kk.jax.bound(kk.bound.MaxNorm(2.0), unit_axes={"*kernel": -1}),
)


def fresh(key: jax.Array) -> dict:
    """Return a network of two layers."""
    one, two = jax.random.split(key)
    hidden = {"kernel": jax.random.normal(one, (64, 128)) / 8, "bias": jnp.zeros(128)}
    return {
        "hidden": hidden,
        "head": {"kernel": jax.random.normal(two, (128, 10)) / 11, "bias": jnp.zeros(10)},
    }


def logits(params: dict, images: jax.Array) -> jax.Array:
    """Return one row of ten numbers per image."""
    hidden = jax.nn.relu(images @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


@jax.jit
def step(params: dict, state: optax.OptState, images: jax.Array, labels: jax.Array) -> tuple:
    """Return parameters and state after one batch."""
    loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(logits(p, images), labels)  # noqa: E731
    grads = jax.grad(lambda p: loss(p).mean())(params)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def main() -> None:
    """Train for 20 epochs and print the accuracy and the share of clipped steps."""
    params = fresh(jax.random.key(0))
    state, clipped = OPTIMIZER.init(params), 0
    for epoch in range(20):
        order = jax.random.permutation(jax.random.key(epoch), 1_400)
        for batch in order.reshape(-1, 50):
            params, state = step(params, state, IMAGES[batch], LABELS[batch])
            clipped += kk.jax.outcome(state).engaged
        kk.jax.check(state)
    right = jnp.mean(logits(params, IMAGES[TEST]).argmax(1) == LABELS[TEST])
    norms = [jnp.linalg.norm(layer["kernel"], axis=0).max() for layer in params.values()]
    print(
        f"test digits right {100 * right:.1f} %, clipped {100 * clipped / 560:.0f} % of the steps"
    )
    print(f"largest norm of a unit's weights {max(norms):.3f}")
    print(f"last step: {kk.jax.outcome(state)}")


if __name__ == "__main__":
    main()
