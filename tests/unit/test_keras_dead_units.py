"""Keras models without a target: units go whose removal does not change the outputs, constants move into biases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

keras = pytest.importorskip("keras")
layers, ops = keras.layers, keras.ops

from karikomi.keras import prune_, shrink  # noqa: E402
from keras_backends import BACKEND, sampled  # noqa: E402


def outputs(model: Any, values: np.ndarray) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(model(values, training=False)))


def inputs_of(model: Any, batch: int = 4) -> np.ndarray:
    shape = (batch, *model.input_shape[1:])
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def set_(layer: Any, name: str, at: Any, to: float) -> None:
    variable = getattr(layer, name)
    values = np.array(ops.convert_to_numpy(variable))
    values[at] = to
    variable.assign(values)


def randomly(model: Any, seed: int = 0) -> Any:
    """Give all weights values of which none is zero, biases and running means included."""
    generator = np.random.default_rng(seed)
    for variable in model.variables:
        if "seed" in variable.path:
            continue
        values = generator.uniform(0.2, 1.0, tuple(variable.shape))
        sign = 1.0 if "variance" in variable.path else generator.choice([-1.0, 1.0], values.shape)
        variable.assign((values * sign).astype("float32"))
    return model


def mlp(activation: str = "relu") -> Any:
    names = [("a", 8, activation), ("b", 6, activation), ("c", 3, None)]
    value = given = keras.Input((5,))
    for name, units, act in names:
        value = layers.Dense(units, act, name=name)(value)
    return randomly(keras.Model(given, value))


def removed(model: Any) -> tuple[Any, Any]:
    """Return the smaller model, after its outputs were compared, and the report."""
    before = [np.array(ops.convert_to_numpy(v)) for v in model.variables]
    small, report = shrink(model)
    values = inputs_of(model)
    np.testing.assert_allclose(outputs(small, values), outputs(model, values), atol=2e-5, rtol=1e-5)
    for variable, numbers in zip(model.variables, before, strict=True):
        assert (np.asarray(ops.convert_to_numpy(variable)) == numbers).all(), "the original changed"
    return small, report


def test_nothing_goes_where_nothing_is_dead() -> None:
    small, report = removed(mlp())
    assert report.removed == 0 and small.count_params() == mlp().count_params()


def test_units_that_nothing_reads_go_with_their_bias() -> None:
    model = mlp()
    set_(model.get_layer("b"), "kernel", np.s_[[0, 5]], 0.0)
    small, report = removed(model)
    assert report.widths_after == {"a": 6, "b": 6, "c": 3}
    assert small.get_layer("a").units == 6


def test_a_constant_moves_into_the_next_bias() -> None:
    model = mlp("tanh")
    set_(model.get_layer("a"), "kernel", np.s_[:, [1, 2]], 0.0)
    a, b = model.get_layer("a"), model.get_layer("b")
    set_(a, "bias", 1, 0.0)
    kernel = np.array(ops.convert_to_numpy(b.kernel))
    bias, own = (np.array(ops.convert_to_numpy(layer.bias)) for layer in (b, a))
    small, report = removed(model)
    assert report.widths_after == {"a": 6, "b": 6, "c": 3}
    expected = bias + np.tanh(own[2]) * kernel[2]
    found = np.asarray(ops.convert_to_numpy(small.get_layer("b").bias))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_becomes_dead_goes_in_a_further_round() -> None:
    model = mlp()
    set_(model.get_layer("c"), "kernel", np.s_[[0]], 0.0)
    b = model.get_layer("b")
    set_(b, "kernel", np.s_[[3], 1:], 0.0)
    small, report = removed(model)
    assert report.widths_after == {"a": 7, "b": 5, "c": 3}


def test_a_layer_keeps_one_unit_and_the_report_names_it() -> None:
    model = mlp()
    set_(model.get_layer("b"), "kernel", np.s_[:], 0.0)
    _, report = removed(model)
    assert report.widths_after["a"] == 1
    assert "keeps one unit" in " ".join(report.left_alone.values())


def convolutions(padding: str, shift: float) -> Any:
    value = given = keras.Input((8, 8, 2))
    for layer in (
        layers.Conv2D(6, 3, use_bias=False, name="a"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(),
        layers.DepthwiseConv2D(3, padding="valid", use_bias=False),
        layers.Conv2D(5, 3, padding=padding, activation="relu", name="b"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(3, name="c"),
    ):
        value = layer(value)
    model = randomly(keras.Model(given, value))
    set_(model.get_layer("a"), "kernel", np.s_[..., [0, 4]], 0.0)
    set_(model.get_layer("norm"), "moving_mean", [0, 4], 0.0)
    set_(model.get_layer("norm"), "beta", [0, 4], shift)
    return model


@pytest.mark.parametrize(
    ("padding", "shift", "left"), [("valid", 0.7, 4), ("same", -0.7, 4), ("same", 0.7, 6)]
)
def test_a_constant_channel_crosses_no_zero_padding(padding: str, shift: float, left: int) -> None:
    _, report = removed(convolutions(padding, shift))
    assert report.widths_after["a"] == left
    assert ("b pads with zeros" in " ".join(report.left_alone.values())) == (left == 6)


def test_a_sum_without_weights_reads_all_units() -> None:
    given = keras.Input((5,))
    hidden = layers.Dense(6, "relu", name="a")(given)
    total = ops.sum(hidden, axis=-1, keepdims=True)
    model = randomly(keras.Model(given, layers.Dense(2, name="b")(hidden) + total))
    set_(model.get_layer("b"), "kernel", np.s_[[0, 1]], 0.0)
    _, report = removed(model)
    assert report.widths_after["a"] == 6


def test_a_layer_that_is_used_twice_takes_no_constant() -> None:
    given = keras.Input((5,))
    shared = layers.Dense(4, "relu", name="b")
    first, second = layers.Dense(6, name="a")(given), layers.Dense(6, name="z")(given)
    model = randomly(keras.Model(given, shared(first) - 2.0 * shared(second)))
    for name in ("a", "z"):
        set_(model.get_layer(name), "kernel", np.s_[:, 0], 0.0)
    _, report = removed(model)
    assert report.widths_after["a"] == 6 and "called 2 times" in " ".join(
        report.left_alone.values()
    )


def _residual() -> Any:
    given = keras.Input((6,))
    stem = layers.Dense(8, name="stem")(given)
    inner = layers.Dense(8, name="second")(layers.Dense(10, "relu", name="first")(stem))
    return keras.Model(given, layers.Dense(3, name="head")(ops.relu(stem + inner)))


def _recurrent() -> Any:
    given = keras.Input((5, 3))
    seen = layers.LSTM(6, name="lstm")(layers.Dense(7, "relu", name="project")(given))
    return keras.Model(given, layers.Dense(2, name="head")(seen))


def _attention() -> Any:
    given = keras.Input((4, 8))
    seen = layers.LayerNormalization()(layers.MultiHeadAttention(2, 4, name="heads")(given, given))
    hidden = layers.Dense(12, "gelu", name="wide")(seen)
    return keras.Model(given, layers.Dense(8, name="narrow")(hidden) + given)


@pytest.mark.parametrize("make", sampled([mlp, _residual, _recurrent, _attention], "masks"))
@settings(max_examples=6 if BACKEND == "torch" else 2, deadline=None)
@drawn(seed=st.integers(0, 999), density=st.floats(0.02, 0.6))
def test_any_mask(make: Callable[[], Any], seed: int, density: float) -> None:
    """Whatever is zero, the outputs stay: single weights, whole rows, whole columns."""
    model = randomly(make(), seed)
    generator = np.random.default_rng(seed)
    for variable in model.variables:
        if len(variable.shape) > 1:
            values = np.array(ops.convert_to_numpy(variable))
            values *= generator.random(values.shape) < density
            values *= generator.random(values.shape[-1]) < 0.7
            variable.assign(values)
    removed(model)


def test_after_pruning_whole_units_and_saved(tmp_path: Path) -> None:
    model = mlp()
    prune_(model, 0.5, pattern="units")
    small, report = removed(model)
    assert report.removed >= 6 and small.count_params() < model.count_params()
    small.save(tmp_path / "small.keras")
    again = keras.models.load_model(tmp_path / "small.keras")
    values = inputs_of(model)
    np.testing.assert_array_equal(outputs(again, values), outputs(small, values))
