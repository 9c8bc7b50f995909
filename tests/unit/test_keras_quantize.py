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
from karikomi.keras.layers.unit_axes import weights_of  # noqa: E402
from karikomi.keras.quantization.curvature import squared_gradients  # noqa: E402
from karikomi.quantize import kmeans, uniform  # noqa: E402
from keras_backends import sampled, slow_on  # noqa: E402

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
    assert {path.rpartition("/")[2] for path in coded} == {*units, *_biases(layer)}
    assert set(coded.left_alone.values()) <= {"not floating"}
    for variable in layer.weights:
        path = variable.path
        if path in coded:
            axis, groups = units.get(variable.name, (None, 1))
            bits = 5 if variable.name in units else 16
            expected = uniform(before[path], bits=bits, axis=axis, groups=groups)
            assert np.array_equal(coded[path].codes, expected.codes)
            assert np.array_equal(coded[path].grid.numbers, expected.grid.numbers)
            assert np.array_equal(array(variable), expected.decode())
            assert bits == 16 or not np.array_equal(array(variable), before[path])


def _biases(layer: Any) -> set[str]:
    return {variable.name for variable in layer.weights if "bias" in variable.name}


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


def test_vectors_have_sixteen_bits_and_variances_equal_ratios() -> None:
    model = network()
    variance = RNG.uniform(0.01, 40.0, size=4).astype("float32")
    model.get_layer("norm").moving_variance.assign(variance)
    before = {variable.path: array(variable) for variable in model.weights}
    coded = quantize_(model, bits=4, exclude="*/head/kernel")
    assert coded.left_alone == {"net/head/kernel": "not selected"} and not coded.notes
    kinds = {path: (type(t.grid).__name__, t.grid.bits) for path, t in coded.items()}
    assert kinds.pop("net/conv/kernel") == ("UniformGrid", 4)
    assert kinds.pop("net/norm/moving_variance")[0] == "OctaveGrid"
    assert set(kinds.values()) == {("UniformGrid", 16)} and len(kinds) == 5
    assert np.abs(array(model.get_layer("norm").moving_variance) / variance - 1).max() < 0.006
    for path in kinds:
        values = next(array(v) for v in model.weights if v.path == path)
        assert np.abs(values - before[path]).max() <= np.abs(before[path]).max() * 2**-16 + 1e-12


class Strange(layers.Layer):
    """A layer that karikomi does not know."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(**options)
        self.width = width

    def build(self, shape: Any) -> None:
        self.mixing = self.add_weight(shape=(self.width, shape[-1]), name="mixing")
        self.slope = self.add_weight(shape=(1, shape[-1]), name="slope")
        self.seen = self.add_weight(shape=(20, 20), name="seen", trainable=False)
        self.empty = self.add_weight(shape=(0, 20), name="empty")

    def call(self, inputs: Any) -> Any:
        return self.slope * inputs


def test_layers_that_are_not_known() -> None:
    large, small = (
        built(Strange(300, name="large"), (None, 6)),
        built(Strange(3, name="small"), (None, 6)),
    )
    coded = quantize_(large, bits=8) | quantize_(small, bits=8)
    assert {
        path: (tensor.grid.numbers.size, tensor.grid.bits) for path, tensor in coded.items()
    } == {
        "large/mixing": (1, 8),
        "large/slope": (1, 16),
        "small/mixing": (1, 16),
        "small/slope": (1, 16),
    }
    assert quantize_(small, bits=8).left_alone == {
        "small/seen": "seen of Strange: not trained, and no rule is known for it",
        "small/empty": "it is empty",
    }


def test_statistics_of_the_data_and_what_keras_has_quantized_stay() -> None:
    statistics = layers.Normalization(name="data")
    model = keras.Sequential(
        [keras.Input((4,)), statistics, layers.Dense(4, name="own")], name="net"
    )
    model.get_layer("own").quantize("int8")
    with pytest.raises(
        Unsupported, match="data/mean: mean of Normalization: a statistic of the data"
    ):
        quantize_(model, bits=8)
    head = layers.Dense(2, name="head")
    whole = keras.Sequential([keras.Input((4,)), *model.layers, head], name="whole")
    coded = quantize_(whole, bits=8)
    assert set(coded) == {head.kernel.path, head.bias.path}
    assert "Keras has quantized this layer (int8)" in coded.left_alone.values()


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
    kk.save(filled, tmp_path / "m.karikomi")
    fill_(filled, kk.keras.to_arrays(filled))
    floats = kk.load(kk.save(filled, tmp_path / "floats.karikomi"))
    assert {array.dtype.name for array in floats.values()} == {kept[0]}


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
    assert sum(isinstance(item, kk.quantize.Coded) for item in again.values()) == 26


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
    assert list(quantize_(model, entries=3)) == ["shared/kernel", "shared/bias"]
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
    model.compile(keras.optimizers.Adam(0.01), "mse")
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
    small = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Dense(2)])
    quantize_(small, bits=8)
    with pytest.raises(Unsupported, match="shrink before quantize_"):
        kk.keras.shrink(small, width=0.5)
    model = network()
    before = [array(variable) for variable in model.weights]
    for bad in (
        {},
        {"bits": 4, "entries": 4},
        {"bits": 4, "method": "kmeans"},
        {"bits": 1},
        {"bits": 4, "method": "gptq"},
        {"bits": 4, "method": "gptq", "data": iter([IMAGES])},
        {"entries": 4, "group": 2},
    ):
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


def error(model: Any, inputs: Any, before: np.ndarray) -> float:
    return float(np.square(array(model(inputs)) - before).sum() / np.square(before).sum())


def recurrent() -> Any:
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(9, 8, name="words"),
            layers.Bidirectional(layers.LSTM(6, return_sequences=True), name="both"),
            layers.GRU(5, name="gru"),
            layers.Dense(4, name="head"),
        ],
        name="net",
    )


WORDS = RNG.integers(0, 9, size=(256, 6))
COMMON = RNG.normal(size=(256, 6, 6, 1)).astype("float32")
SMOOTH = COMMON + RNG.normal(size=(256, 6, 6, 2)).astype("float32") * 0.1


@pytest.mark.parametrize(
    ("make", "inputs"),
    sampled([(network, SMOOTH), (recurrent, WORDS)], "gptq"),
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_compensated_errors_change_the_outputs_less(make: Any, inputs: Any) -> None:
    model, plain = make(), make()
    masks = prune_(model, sparsity=0.1)
    prune_(plain, sparsity=0.1)
    before = array(model(inputs))
    options = {"bits": 3, "only": "*kernel*"}
    nearest = quantize_(plain, **options)
    coded = quantize_(
        model, method="gptq", data=[inputs[:150], inputs[150:]], progress=False, **options
    )
    assert error(model, inputs, before) < 0.7 * error(plain, inputs, before)
    assert not coded.notes
    for (path, tensor), other in zip(coded.items(), nearest.values(), strict=True):
        # The grids are the same; only the codes differ.
        assert np.array_equal(tensor.grid.numbers, other.grid.numbers), path
    for variable in model.weights:
        if variable.path in coded:
            assert np.array_equal(array(variable), coded[variable.path].decode())
    assert all(not array(v)[~mask].any() for v, mask in masks.pairs(model.weights))


def test_pruned_weights_stay_zero_where_compensation_would_use_them() -> None:
    keras.utils.set_random_seed(3)
    layer = layers.Dense(64, use_bias=False, name="head")
    model = keras.Sequential([keras.Input((17,)), layer], name="net")
    random = np.random.default_rng(0)
    own = random.normal(size=(400, 16)) + random.normal(size=(400, 1))
    # The last input says what all others say together.
    inputs = np.concatenate([own, 0.03 * own.sum(axis=1, keepdims=True)], axis=1).astype("float32")
    kernel = random.uniform(-0.28, 0.28, size=(64, 17)).T
    kernel[16] = 0.0
    layer.kernel.assign(kernel)
    coded = quantize_(model, bits=3, method="gptq", data=[inputs], progress=False)
    assert not coded.notes and not array(layer.kernel)[16].any()
    assert np.count_nonzero(array(layer.kernel)[:16]) > 500


def test_what_is_not_compensated_is_noted_and_an_error_restores() -> None:
    model = recurrent()
    coded = quantize_(
        model, bits=4, method=kk.quantize.GPTQ(damping=0.05), data=[WORDS], group=4, progress=False
    )
    assert coded.notes == {
        "net/words/embeddings": "nearest values: the inputs of Embedding are not read"
    }
    assert len(coded) == len(model.weights)


class Broken:
    """One batch, and an error after it when it is read for the fifth time."""

    runs = 0

    def __iter__(self) -> Any:
        yield WORDS
        self.runs += 1
        if self.runs > 4:
            raise RuntimeError("no more data")


def test_after_an_error_the_model_is_as_before() -> None:
    model, data = recurrent(), Broken()
    before = [array(variable) for variable in model.weights]
    with pytest.raises(RuntimeError, match="no more data"):
        quantize_(model, bits=4, method="gptq", data=data, progress=False)
    assert data.runs == 5
    assert all(np.array_equal(a, array(b)) for a, b in zip(before, model.weights, strict=True))
    assert not any(isinstance(item, kk.quantize.Coded) for item in to_stored(model).values())


def rate_of(coded: Any) -> float:
    bits = 0.0
    for tensor in coded.values():
        counts = np.unique(tensor.codes, return_counts=True)[1].astype(float)
        bits += (counts * np.log2(counts.sum() / counts)).sum() + 8 * counts.size
    return bits / sum(tensor.codes.size for tensor in coded.values())


@slow_on("jax", "tensorflow")
def test_a_rate_is_met_and_steps_follow_the_curvature() -> None:
    model = recurrent()
    before = array(model(WORDS))
    coded = quantize_(model, rate=4.0, data=[WORDS[:128], WORDS[128:]], progress=False)
    # The codes of a small network take tables, which count.
    assert rate_of(coded) == pytest.approx(4.0, rel=0.05)
    assert {t.grid.numbers.size for p, t in coded.items() if p.endswith("kernel")} == {1}
    assert coded["net/words/embeddings"].grid.numbers.size == 9
    assert coded["net/head/bias"].grid.bits == 8
    steps = {path: float(t.grid.numbers.max()) for path, t in coded.items() if "head/k" in path}
    assert steps["net/head/kernel"] > 0 and error(model, WORDS, before) < 0.05
    plain = recurrent()
    nearest = quantize_(plain, rate=4.0)
    assert rate_of(nearest) == pytest.approx(4.0, rel=0.05)
    assert error(model, WORDS, before) < error(plain, WORDS, before)
    for bad in ({"rate": 0.0}, {"rate": 4.0, "group": 4}, {"rate": 4.0, "bits": 4}):
        with pytest.raises(InvalidArgument):
            quantize_(plain, **bad)


def test_the_curvature_is_that_of_the_outputs() -> None:
    keras.utils.set_random_seed(1)
    layer = layers.Dense(2, use_bias=False, name="head")
    model = keras.Sequential([keras.Input((3,)), layer], name="net")
    x = RNG.normal(size=(50, 3)).astype("float32")
    weights = {"k": weights_of(model, where="")[0]}
    found = squared_gradients(model, weights, [x] * 60, draws=3, progress=False, where="")
    # d(sum of noise * x w) / dw_ij = sum over examples of noise_j x_i.
    wanted = np.square(x).mean(axis=0)[:, None] * np.ones((3, 2))
    assert np.allclose(found["k"], wanted, rtol=0.45)
    assert found["k"].mean() == pytest.approx(wanted.mean(), rel=0.15)
