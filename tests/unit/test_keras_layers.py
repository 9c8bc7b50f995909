"""What the type of a Keras layer says of its variables: unit axes and fan-ins."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
layers = keras.layers

from karikomi.errors import InvalidArgument  # noqa: E402
from karikomi.keras.layers.unit_axes import fan_ins, unit_axes  # noqa: E402

IMAGES, SERIES, PLAIN = (8, 8, 4), (6, 5), (7,)
CASES: dict[str, tuple[Any, tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "Dense": (lambda: layers.Dense(3), PLAIN, {"kernel": (1,)}),
    "Dense on a sequence": (lambda: layers.Dense(3), SERIES, {"kernel": (1,)}),
    "Conv1D": (lambda: layers.Conv1D(3, 2), SERIES, {"kernel": (2,)}),
    "Conv2D in groups": (lambda: layers.Conv2D(6, 3, groups=2), IMAGES, {"kernel": (3,)}),
    "Conv3D": (lambda: layers.Conv3D(3, 2), (4, 4, 4, 2), {"kernel": (4,)}),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(3, 2), IMAGES, {"kernel": (2,)}),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(3, 2), SERIES, {"kernel": (1,)}),
    "DepthwiseConv2D": (
        lambda: layers.DepthwiseConv2D(3, depth_multiplier=2),
        IMAGES,
        {"kernel": (2, 3)},
    ),
    "DepthwiseConv1D": (lambda: layers.DepthwiseConv1D(3), SERIES, {"kernel": (1, 2)}),
    "SeparableConv2D": (
        lambda: layers.SeparableConv2D(3, 2),
        IMAGES,
        {"depthwise_kernel": (2, 3), "pointwise_kernel": (3,)},
    ),
    "EinsumDense": (
        lambda: layers.EinsumDense("abc,cde->abed", (None, 4, 2), bias_axes="e"),
        SERIES,
        {"kernel": (1, 2)},
    ),
    "EinsumDense of experts": (
        lambda: layers.EinsumDense("...bc,bce->...be", (6, 3)),
        SERIES,
        {"kernel": (0, 2)},
    ),
    "SimpleRNN": (
        lambda: layers.SimpleRNN(3),
        SERIES,
        {"kernel": (1,), "recurrent_kernel": (1,)},
    ),
    "LSTM": (lambda: layers.LSTM(3), SERIES, {"kernel": (1,), "recurrent_kernel": (1,)}),
    "GRU in a wrapper of cells": (
        lambda: layers.RNN(layers.GRUCell(3)),
        SERIES,
        {"kernel": (1,), "recurrent_kernel": (1,)},
    ),
    "ConvLSTM1D": (
        lambda: layers.ConvLSTM1D(3, 2),
        (5, 6, 2),
        {"kernel": (2,), "recurrent_kernel": (2,)},
    ),
    "TimeDistributed": (lambda: layers.TimeDistributed(layers.Dense(3)), SERIES, {"kernel": (1,)}),
}


def built(layer: Any, shape: tuple[int, ...]) -> Any:
    return keras.Sequential([keras.Input(shape), layer])


def by_leaf(found: dict[str, Any]) -> dict[str, Any]:
    return {path.rpartition("/")[2]: value for path, value in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_unit_axis_is_a_fact_of_the_layers_type(case: str) -> None:
    make, shape, axes = CASES[case]
    found, reasons = unit_axes(built(make(), shape))
    assert by_leaf(found) == axes
    assert set(by_leaf(reasons)) <= {"bias"} and set(reasons.values()) <= {"a bias"}


@pytest.mark.parametrize("case", CASES)
def test_the_fan_in_is_that_of_keras_own_initialisers(case: str) -> None:
    from keras.src.initializers.random_initializers import compute_fans

    make, shape, axes = CASES[case]
    model = built(make(), shape)
    found, reasons = fan_ins(model)
    assert reasons == {}
    shapes = {v.path: tuple(v.shape) for v in model.weights}
    for path, own in found.items():
        leaf = path.rpartition("/")[2]
        if leaf != "bias":
            every = range(len(shapes[path]))
            sides = ()
            if "Einsum" in case:
                sides = ([a for a in every if a not in axes[leaf]], list(axes[leaf]))
            assert own == compute_fans(shapes[path], *sides)[0]


def test_a_unit_is_what_one_output_reads() -> None:
    """The definition itself: with all of one unit's weights at zero, one output is zero."""
    rng = np.random.default_rng(0)
    for case in ("Dense", "Conv2D in groups", "Conv2DTranspose", "EinsumDense", "DepthwiseConv2D"):
        make, shape, _ = CASES[case]
        model = built(make(), shape)
        ((path, axes),) = unit_axes(model)[0].items()
        weight = next(v for v in model.weights if v.path == path)
        values = rng.uniform(1.0, 2.0, weight.shape).astype("float32")
        index = tuple(0 if axis in axes else slice(None) for axis in range(values.ndim))
        values[index] = 0.0
        weight.assign(values)
        outputs = np.asarray(
            keras.ops.convert_to_numpy(model(rng.uniform(1.0, 2.0, (2, *shape)).astype("float32")))
        )
        units = outputs.reshape(
            2, -1, *outputs.shape[-2:] if case == "EinsumDense" else (outputs.shape[-1],)
        )
        zero = np.all(units == 0.0, axis=(0, 1))
        assert zero.flat[0] and zero.sum() == 1, case


def test_attention_is_read_from_the_equations_of_its_projections() -> None:
    inputs = keras.Input(SERIES)
    outputs = layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs)
    outputs = layers.GroupQueryAttention(4, 4, 2, name="grouped")(outputs, outputs)
    found, _ = unit_axes(keras.Model(inputs, outputs))
    ends = {path.split("/", 1)[1]: axes for path, axes in found.items() if "attention/" in path}
    assert ends["query/kernel"] == (1, 2) and ends["attention_output/kernel"] == (2,)
    fans, _ = fan_ins(keras.Model(inputs, outputs))
    assert fans["grouped/attention_output/kernel"] == 16 and fans["attention/value/kernel"] == 5


def test_layers_without_units_say_why() -> None:
    inputs = keras.Input((4,))
    outputs = layers.Bidirectional(layers.LSTM(2), name="both")(
        layers.Embedding(9, 5, name="table")(inputs)
    )
    outputs = layers.PReLU(name="prelu")(layers.BatchNormalization(name="norm")(outputs))
    model = keras.Model(inputs, outputs)
    axes, reasons = unit_axes(model)
    assert axes["table/embeddings"] == (0,)
    assert sum(path.startswith("both/") for path in axes) == 4
    assert reasons["norm/gamma"] == "BatchNormalization declares no unit axis"
    assert reasons["prelu/alpha"] == "PReLU declares no unit axis"
    fans, why = fan_ins(model)
    assert why["table/embeddings"] == "Embedding has no fan-in" and "norm/beta" in why
    recurrent = [fan for path, fan in fans.items() if path.endswith("recurrent_kernel")]
    assert recurrent == [2, 2]


class Twice(keras.layers.Layer):
    """A layer of one's own with an own variable, and another layer inside."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inner = layers.Dense(3, name="inner")

    def build(self, shape: Any) -> None:
        self.inner.build(shape)
        self.kernel = self.add_weight(name="kernel", shape=(3, 3))
        self.count = self.add_weight(name="count", shape=(), dtype="int32", trainable=False)

    def call(self, inputs: Any) -> Any:
        return self.inner(inputs) @ self.kernel


def test_a_variable_belongs_to_the_innermost_layer_and_an_unknown_layer_declares_nothing() -> None:
    model = built(Twice(name="own"), PLAIN)
    axes, reasons = unit_axes(model)
    assert [path.rpartition("own/")[2] for path in axes] == ["inner/kernel"]
    assert by_leaf(reasons) == {
        "kernel": "Twice declares no unit axis",
        "count": "not floating",
        "bias": "a bias",
    }


def test_shared_and_nested_layers_count_once() -> None:
    shared = layers.Dense(4, name="shared")
    inputs = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), shared], name="inner")
    model = keras.Model(inputs, shared(inner(inputs)))
    assert list(unit_axes(model)[0].values()) == [(1,)]


@pytest.mark.parametrize("what", [keras.Sequential([layers.Dense(2)]), np.zeros(3)])
def test_what_has_no_variables_is_refused(what: Any) -> None:
    with pytest.raises(InvalidArgument, match="no variables yet|not a Keras model"):
        unit_axes(what)
