"""Quantized Keras models on each backend: every kind of layer, decoded values, files, masks, training afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
layers = keras.layers

import karikomi as kk  # noqa: E402
from karikomi.errors import BadFile, InvalidArgument, NonFinite, UnknownName, Unsupported  # noqa: E402
from karikomi.keras import fill_, prune_, quantize_  # noqa: E402
from karikomi.keras.layers.arrays import NOTE, notes_of, to_stored  # noqa: E402
from karikomi.quantize import kmeans, uniform  # noqa: E402
from keras_backends import sampled  # noqa: E402

RNG = np.random.default_rng(5)


def array(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable), dtype=np.float32)


def built(layer: Any, *shapes: tuple[int | None, ...]) -> Any:
    keras.utils.set_random_seed(1)
    layer.build(*shapes)
    return layer


# Layer, shapes of its inputs, name of a variable -> axis, and groups of the first axis, that have scales of their own.
KINDS: dict[str, tuple[Any, list, dict[str, tuple[int | None, int]]]] = {
    "dense": (lambda: layers.Dense(3), [(None, 4)], {"kernel": (1, 1)}),
    "einsum": (
        lambda: layers.EinsumDense("abc,cd->abd", (None, 3)),
        [(None, 5, 4)],
        {"kernel": (1, 1)},
    ),
    "einsum of groups": (
        lambda: layers.EinsumDense("acd,cde->ace", (2, 3)),
        [(None, 2, 4)],
        {"kernel": (2, 2)},
    ),
    "conv1d": (lambda: layers.Conv1D(3, 2), [(None, 8, 4)], {"kernel": (2, 1)}),
    "conv2d": (lambda: layers.Conv2D(4, 3, groups=2), [(None, 8, 8, 4)], {"kernel": (3, 1)}),
    "conv3d": (lambda: layers.Conv3D(3, 2), [(None, 4, 4, 4, 2)], {"kernel": (4, 1)}),
    "transposed": (lambda: layers.Conv2DTranspose(5, 3), [(None, 8, 8, 4)], {"kernel": (2, 1)}),
    "depthwise": (lambda: layers.DepthwiseConv2D(3), [(None, 8, 8, 4)], {"kernel": (2, 1)}),
    "depthwise of one channel": (
        lambda: layers.DepthwiseConv1D(3, depth_multiplier=4),
        [(None, 8, 1)],
        {"kernel": (2, 1)},
    ),
    "separable": (
        lambda: layers.SeparableConv2D(5, 3),
        [(None, 8, 8, 4)],
        {"depthwise_kernel": (2, 1), "pointwise_kernel": (3, 1)},
    ),
    "embedding": (lambda: layers.Embedding(7, 3), [(None, 5)], {"embeddings": (0, 1)}),
    "lstm": (
        lambda: layers.LSTM(3),
        [(None, 5, 4)],
        {"kernel": (1, 1), "recurrent_kernel": (1, 1)},
    ),
    "gru, both ways": (
        lambda: layers.Bidirectional(layers.GRU(3)),
        [(None, 5, 4)],
        {"kernel": (1, 1), "recurrent_kernel": (1, 1)},
    ),
    "convlstm": (
        lambda: layers.ConvLSTM2D(3, 2),
        [(None, 4, 5, 5, 2)],
        {"kernel": (3, 1), "recurrent_kernel": (3, 1)},
    ),
    "attention": (
        lambda: layers.MultiHeadAttention(2, 3, value_dim=4),
        [(None, 5, 6), (None, 5, 6)],
        # Heads and width together name a unit of queries, keys and values: the longer axis has the scales.
        {"kernel": (2, 1)},
    ),
    "grouped attention": (
        lambda: layers.GroupQueryAttention(5, 4, 2),
        [(None, 5, 6), (None, 5, 6)],
        {"kernel": (2, 1)},
    ),
}


@pytest.mark.parametrize("kind", sampled(KINDS, "kinds", most=5))
def test_each_kind_of_layer_has_scales_along_its_own_units(kind: str) -> None:
    make, shapes, units = KINDS[kind]
    layer = built(make(), *shapes)
    before = {variable.path: array(variable) for variable in layer.weights}
    coded = quantize_(layer, bits=5)
    assert {path.rpartition("/")[2] for path in coded} == set(units)
    for variable in layer.weights:
        path = variable.path
        if path in coded:
            axis, groups = units[variable.name]
            expected = uniform(before[path], bits=5, axis=axis, groups=groups)
            assert np.array_equal(coded[path].codes, expected.codes)
            assert np.array_equal(coded[path].grid.numbers, expected.grid.numbers)
            assert np.array_equal(array(variable), expected.decode())
            assert not np.array_equal(array(variable), before[path])
        else:
            assert np.array_equal(array(variable), before[path])
            assert coded.left_alone[path] in ("a bias", "not floating")


def network(name: str = "net", dtype: str | None = None) -> Any:
    keras.utils.set_random_seed(3)
    own = {"dtype": dtype} if dtype else {}
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, activation="relu", name="conv", **own),
            layers.BatchNormalization(name="norm", **own),
            layers.Flatten(),
            layers.Dense(3, name="head", **own),
        ],
        name=name,
    )


IMAGES = RNG.normal(size=(8, 6, 6, 2)).astype("float32")
TARGETS = RNG.normal(size=(8, 3)).astype("float32")


def test_reasons_are_given_for_all_other_variables() -> None:
    coded = quantize_(network(), bits=4, exclude="*/head/*")
    assert list(coded) == ["net/conv/kernel"]
    assert coded.left_alone == {
        "net/conv/bias": "a bias",
        "net/norm/gamma": "gamma of a normalisation",
        "net/norm/beta": "beta of a normalisation",
        "net/norm/moving_mean": "moving_mean of a normalisation",
        "net/norm/moving_variance": "moving_variance of a normalisation",
        "net/head/bias": "a bias",
        "net/head/kernel": "not selected",
    }


class Strange(layers.Layer):
    """A layer that karikomi does not know."""

    def build(self, shape: Any) -> None:
        self.mixing = self.add_weight(shape=(shape[-1], shape[-1]), name="mixing")
        self.slope = self.add_weight(shape=(1, shape[-1]), name="slope")

    def call(self, inputs: Any) -> Any:
        return self.slope * keras.ops.matmul(inputs, self.mixing)


def test_a_matrix_of_an_unknown_layer_has_one_scale_and_a_vector_stays() -> None:
    layer = built(Strange(name="strange"), (None, 6))
    coded = quantize_(layer, bits=8)
    assert {path: tensor.grid.numbers.size for path, tensor in coded.items()} == {
        "strange/mixing": 1
    }
    assert coded.left_alone == {"strange/slope": "slope of Strange: a vector"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed_bfloat16"])
def test_variables_keep_their_type_and_have_the_decoded_values_in_it(
    dtype: str, tmp_path: Path
) -> None:
    model = network(dtype=dtype)
    kept = [variable.dtype for variable in model.weights]
    coded = quantize_(model, bits=4)
    assert [variable.dtype for variable in model.weights] == kept
    for variable in model.weights:
        if variable.path in coded:
            wanted = keras.ops.cast(coded[variable.path].decode(), variable.dtype)
            assert np.array_equal(array(variable), array(wanted))
    filled = network(dtype=dtype)
    kk.load(kk.save(model, tmp_path / "m.karikomi"), into=filled)
    assert all(
        np.array_equal(array(a), array(b))
        for a, b in zip(model.weights, filled.weights, strict=True)
    )
    kind = "bfloat16" if dtype == "bfloat16" else "float16" if dtype == "float16" else "float32"
    assert kk.load(tmp_path / "m.karikomi")["net/conv/bias"].dtype.name == kind


def test_a_file_has_the_codes_and_fills_a_model_whose_layers_have_other_numbers(
    tmp_path: Path,
) -> None:
    def unnamed() -> Any:
        hidden = [layers.Dense(6, activation="relu") for _ in range(12)]
        return keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(6)])

    model, other = unnamed(), unnamed()
    inputs = RNG.normal(size=(3, 6)).astype("float32")
    coded = quantize_(model, bits=3)
    stored = kk.pack.load_coded(kk.save(model, tmp_path / "m.karikomi"))
    assert all(np.array_equal(stored[path].codes, tensor.codes) for path, tensor in coded.items())
    assert set(stored) == {variable.path for variable in model.weights}
    assert kk.load(tmp_path / "m.karikomi", into=other) is other
    assert np.array_equal(array(model(inputs)), array(other(inputs)))
    # What was loaded can be saved again as codes: the same bytes but for the names.
    again = to_stored(other)
    assert sum(isinstance(item, kk.quantize.Coded) for item in again.values()) == 13


def test_a_file_is_loaded_by_its_paths_whatever_their_order(tmp_path: Path) -> None:
    first, second = layers.Dense(4, name="a"), layers.Dense(4, name="b")
    path = kk.save(keras.Sequential([keras.Input((4,)), first, second], name="net"), tmp_path / "m")
    copies = layers.Dense(4, name="a"), layers.Dense(4, name="b")
    kk.load(path, into=keras.Sequential([keras.Input((4,)), *copies[::-1]], name="net"))
    for layer, copy in zip((first, second), copies, strict=True):
        assert np.array_equal(array(layer.kernel), array(copy.kernel))


def test_the_networks_must_agree_and_nothing_is_filled_otherwise() -> None:
    model = network()
    before = [array(variable) for variable in model.weights]
    stored, note = to_stored(model), notes_of(model)
    zeros = {name: np.zeros_like(value) for name, value in stored.items()}
    wide = zeros | {"net/head/kernel": np.zeros((64, 4), np.float32)}
    whole = zeros | {"net/head/kernel": np.zeros((64, 3), np.int32)}
    large = zeros | {"net/head/kernel": np.full((64, 3), 1e300)}
    lacking = {name: value for name, value in zeros.items() if name != "net/norm/beta"}
    renamed = {name.replace("net/head", "net/tail"): value for name, value in wide.items()}
    for bad, words in (
        (wide, "another shape"),
        (whole, "another kind of number"),
        (large, "too large"),
        (lacking, "different networks.*net/norm/beta"),
        (renamed, "different networks.*did you mean"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            fill_(model, bad, note if len(bad) == len(stored) else {})
    renamed = {name.replace("net/", "other/"): value for name, value in zeros.items()}
    for bad in ("0 1", "0 0 1 2 3 4 5 6", "x", "7 6 5 4 3 2 1 -0"):
        with pytest.raises(BadFile, match="no order of the variables"):
            fill_(model, renamed, {NOTE: bad})
    assert all(np.array_equal(a, array(b)) for a, b in zip(before, model.weights, strict=True))
    fill_(model, renamed, note)
    assert not any(array(variable).any() for variable in model.weights)


def test_shared_variables_are_quantized_once() -> None:
    shared = layers.Dense(4, name="shared")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, shared(shared(inputs)), name="net")
    assert list(quantize_(model, entries=3)) == ["shared/kernel"]
    assert np.unique(array(shared.kernel)).size == 3


def test_masks_survive_and_a_codebook_has_the_zero_apart() -> None:
    model = network()
    masks = prune_(model, sparsity=0.8)
    before = {variable.path: array(variable) for variable in model.weights}
    coded = quantize_(model, entries=4)
    for variable, mask in masks.pairs(model.weights):
        expected = kmeans(before[variable.path], entries=4)
        assert np.array_equal(coded[variable.path].codes, expected.codes)
        assert np.array_equal(array(variable) != 0, mask)
    again = quantize_(model, bits=8)
    assert all(not array(v)[~mask].any() for v, mask in masks.pairs(model.weights)) and again


def test_a_compiled_model_sees_the_new_weights_and_trains_on(tmp_path: Path) -> None:
    model = network()
    model.compile(keras.optimizers.Adam(0.01, use_ema=True), "mse")
    model.fit(IMAGES, TARGETS, verbose=0)
    before = model.predict(IMAGES, verbose=0)
    optimizer = [array(variable) for variable in model.optimizer.variables]
    quantize_(model, bits=2)
    assert all(
        np.array_equal(a, array(b))
        for a, b in zip(optimizer, model.optimizer.variables, strict=True)
    )
    after = model.predict(IMAGES, verbose=0)
    assert np.abs(after - before).max() > 1e-3
    assert np.allclose(after, array(model(IMAGES, training=False)), atol=1e-5)
    kk.save(model, tmp_path / "before.karikomi")
    model.fit(IMAGES, TARGETS, verbose=0)
    with pytest.raises(Unsupported, match=r"net/conv/kernel: .*changed since quantize_"):
        kk.save(model, tmp_path / "after.karikomi")
    quantize_(model, bits=2)
    kk.save(model, tmp_path / "after.karikomi")


def test_what_cannot_be_done_is_refused_and_the_model_stays() -> None:
    with pytest.raises(InvalidArgument, match="build"):
        quantize_(keras.Sequential([layers.Dense(2)]), bits=8)
    with pytest.raises(InvalidArgument, match="not a Keras model"):
        quantize_([np.ones(2)], bits=8)
    norm = built(layers.BatchNormalization(name="norm"), (None, 4))
    with pytest.raises(Unsupported, match="norm/gamma: gamma of a normalisation"):
        quantize_(norm, bits=8)
    small = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Dense(2)])
    quantize_(small, bits=8)
    with pytest.raises(Unsupported, match="shrink before quantize_"):
        kk.keras.shrink(small, width=0.5)
    model = network()
    before = [array(variable) for variable in model.weights]
    for bad in ({}, {"bits": 4, "entries": 4}, {"bits": 4, "method": "kmeans"}, {"bits": 1}):
        with pytest.raises(InvalidArgument):
            quantize_(model, **bad)
    with pytest.raises(UnknownName):
        quantize_(model, bits=4, only="nothing")
    kernel = np.array(before[-2])
    kernel[0, 0] = np.nan
    model.get_layer("head").kernel.assign(kernel)
    with pytest.raises(NonFinite, match="net/head/kernel"):
        quantize_(model, bits=4)
    assert np.array_equal(array(model.get_layer("conv").kernel), before[0])


def test_a_variable_and_a_mapping_of_variables_are_saved(tmp_path: Path) -> None:
    model = network(dtype="bfloat16")
    path = kk.save({"kernel": model.get_layer("head").kernel}, tmp_path / "v.karikomi")
    loaded = kk.load(path)["kernel"]
    assert loaded.dtype.name == "bfloat16"
    assert np.array_equal(loaded.astype(np.float32), array(model.get_layer("head").kernel))


def test_floats_take_the_place_of_codes(tmp_path: Path) -> None:
    model = network()
    floats = kk.keras.to_arrays(model)
    quantize_(model, bits=2)
    fill_(model, floats)
    assert np.array_equal(
        kk.load(kk.save(model, tmp_path / "m"))["net/head/kernel"], floats["net/head/kernel"]
    )


def test_a_layer_of_statistics_computes_with_what_was_loaded(tmp_path: Path) -> None:
    def standardized() -> Any:
        return keras.Sequential([keras.Input((2,)), layers.Normalization(name="n")], name="net")

    model, other = standardized(), standardized()
    model.layers[0].adapt(RNG.normal(3.0, 2.0, size=(64, 2)).astype("float32"))
    kk.load(kk.save(model, tmp_path / "m"), into=other)
    inputs = RNG.normal(size=(4, 2)).astype("float32")
    assert np.allclose(array(other(inputs)), array(model(inputs)))
    assert not np.allclose(array(other(inputs)), inputs)
