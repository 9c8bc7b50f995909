"""The same network, weights, batches and rule end in the same weights on every backend of Keras."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import pytest

keras = pytest.importorskip("keras")

import karikomi as kk  # noqa: E402
from depth import FULL, turns  # noqa: E402
from keras_backends import BACKEND  # noqa: E402
from parity import small_network as small  # noqa: E402

TANH = {"tensorflow": "tensorflow.math", "jax": "jax.numpy", "torch": "torch"}


class Small(keras.Model):
    """The small network in the backend's own operations.

    On torch and JAX those of Keras 3.15 compute float64 in float32, its layers' and its losses' among them.
    """

    def __init__(self, own: small.Weights) -> None:
        super().__init__()
        self.own = {
            name: self.add_weight(
                shape=array.shape, name=name.replace(".", "_"), dtype=str(array.dtype)
            )
            for name, array in own.items()
        }
        for name, array in own.items():
            self.own[name].assign(array)
        self.tanh = importlib.import_module(TANH[BACKEND]).tanh
        self.built = True

    def call(self, inputs: Any) -> Any:
        """Return what the network makes of a batch."""
        value = {name: one.value for name, one in self.own.items()}
        hidden = self.tanh(inputs @ value["hidden.kernel"] + value["hidden.bias"])
        return hidden @ value["head.kernel"] + value["head.bias"]

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, *_: Any, **__: Any
    ) -> Any:
        """Return the mean squared error."""
        errors = y_pred - keras.ops.convert_to_tensor(y, y_pred.dtype)
        if BACKEND == "tensorflow":
            return keras.ops.mean(errors * errors)
        return (errors * errors).mean()


class SGD(keras.optimizers.SGD):
    """Plain SGD, whose product Keras would round as well."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Step against the gradient."""
        rate = small.LEARNING_RATE["sgd"]
        self.assign_sub(variable, rate * gradient)


def optimizer(kind: str) -> keras.optimizers.Optimizer:
    """Return plain SGD, or Adam with the epsilon of all."""
    if kind == "sgd":
        return SGD(small.LEARNING_RATE[kind])
    return keras.optimizers.Adam(small.LEARNING_RATE[kind], *small.BETAS, epsilon=small.EPSILON)


def train(case: str, kind: str, dtype: str) -> small.Weights:
    """Return the weights after all steps."""
    rule, bound = small.CASES[case]
    model = Small(small.weights(dtype))
    axes = None if isinstance(bound, kk.bound.Clamp) else {"*kernel": 1}
    step = kk.keras.clipped(optimizer(kind), rule, bound=bound, unit_axes=axes)
    model.compile(step)
    for inputs, targets in small.batches(dtype):
        model.train_on_batch(inputs, targets)
    return {name: keras.ops.convert_to_numpy(one) for name, one in model.own.items()}


@contextlib.contextmanager
def floats(dtype: str) -> Iterator[None]:
    """Let Keras and its backend have this dtype for floats."""
    before, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    wide = contextlib.nullcontext()
    if BACKEND == "jax":
        wide = importlib.import_module("jax").enable_x64(dtype == "float64")
    try:
        with wide:
            yield
    finally:
        keras.config.set_floatx(before)
        keras.config.set_dtype_policy(policy)


RUNS = [
    (case, *setting)
    for place, case in enumerate(small.CASES)
    if FULL or BACKEND == "torch" or place % 8 == (BACKEND == "jax")
    for setting in turns(list(small.SETTINGS), case, BACKEND)
]


@pytest.mark.parametrize(("case", "kind", "dtype"), RUNS)
def test_ends_where_numpy_ends(case: str, kind: str, dtype: str) -> None:
    with floats(dtype):
        found = train(case, kind, dtype)
    small.assert_close(found, case, kind, dtype)
