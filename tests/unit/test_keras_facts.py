"""Facts measured on batches of unequal sizes, beside the same numbers worked out over all samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
layers = keras.layers

from karikomi.keras.facts.measure import measure  # noqa: E402
from karikomi.keras.layers.prunable import oriented  # noqa: E402

RNG = np.random.default_rng(5)
LOSS = keras.losses.MeanSquaredError()


def model_of(shape: tuple[int, ...], *inner: Any) -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input(shape), *inner], name="net")


def facts_of(model: Any, *needs: str, data: list[Any], loss: Any = None) -> dict[str, Any]:
    found = oriented(model, where="test")
    wanted = {name: item for name, item in found.items() if name.endswith("kernel")}
    return measure(model, frozenset(needs), wanted, data=data, loss=loss, where="test")


def numbers(variable: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable), np.float64)


def test_moments_of_outputs_are_those_over_all_samples() -> None:
    model = model_of((3,), layers.Dense(4, activation="relu", name="a"))
    # One sample, then two, then five, each batch about another place.
    batches = [
        RNG.normal(at, 1.0, (size, 3)).astype("f4") for size, at in ((1, 0), (2, 3), (5, -2))
    ]
    outputs = numbers(model(np.concatenate(batches)))
    found = facts_of(model, "deviation", "output", "zeros", data=batches)
    expected = {
        "deviation": outputs.std(axis=0),
        "output": np.abs(outputs).mean(axis=0),
        "zeros": (outputs == 0).mean(axis=0),
    }
    for fact, wanted in expected.items():
        np.testing.assert_allclose(found[fact]["net/a/kernel"], wanted, rtol=1e-5, err_msg=fact)


def test_what_is_read_of_the_first_batch_is_read_once_beside_what_needs_all() -> None:
    model = model_of((3,), layers.Dense(4, name="a"))
    batches = [RNG.normal(size=(size, 3)).astype("f4") for size in (2, 5)]
    found = facts_of(model, "macs", "input_norm", data=batches)
    assert found["macs"] == {"net/a/kernel": 12}
    norms = np.linalg.norm(np.concatenate(batches), axis=0)
    np.testing.assert_allclose(found["input_norm"]["net/a/kernel"][:, 0], norms, rtol=1e-5)


def test_multiply_accumulates_of_a_transposed_convolution() -> None:
    layer = layers.Conv1DTranspose(4, 2, strides=3, name="up")
    found = facts_of(model_of((5, 3), layer), "macs", data=[np.ones((2, 5, 3), "f4")])
    assert found["macs"] == {"net/up/kernel": 5 * 2 * 3 * 4}


def test_the_odd_zero_of_a_padding_comes_last() -> None:
    layer = layers.Conv1D(1, 2, padding="same", name="c")
    inputs = np.array([[[3.0], [4.0], [12.0]]], "f4")
    found = facts_of(model_of((3, 1), layer), "input_norm", data=[inputs])
    # The second position of the kernel reads 4, 12 and the zero.
    expected = [13.0, (4.0**2 + 12.0**2) ** 0.5]
    np.testing.assert_allclose(found["input_norm"]["net/c/kernel"].ravel(), expected, rtol=1e-6)


def test_squares_of_gradients_are_a_mean_over_batches() -> None:
    model = model_of((1,), layers.Dense(1, use_bias=False, name="a"))
    model.layers[0].kernel.assign([[0.0]])
    # The slope of (0 * x - y)^2 at 0 is -2 x y: -4, then 12.
    data = [(np.array([[1.0]]), np.array([[2.0]])), (np.array([[2.0]]), np.array([[-3.0]]))]
    found = facts_of(model, "gradient", "squared_gradient", data=data, loss=LOSS)
    assert found["gradient"]["net/a/kernel"].tolist() == [[4.0]]
    assert found["squared_gradient"]["net/a/kernel"].tolist() == [[80.0]]


def test_a_measurement_teaches_a_fresh_batch_normalisation_nothing() -> None:
    norm = layers.BatchNormalization(name="norm")
    model = model_of((3,), layers.Dense(4, name="a"), norm)
    facts_of(model, "output", data=[RNG.normal(size=(9, 3)).astype("f4")])
    assert numbers(norm.moving_mean).tolist() == [0.0] * 4
    assert numbers(norm.moving_variance).tolist() == [1.0] * 4
