"""Smaller copies of Keras models: what goes together, by hand; saved, refused, and the proof that finds faults."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
layers, ops = keras.layers, keras.ops

from karikomi.errors import InvalidArgument, UnknownName, Unsupported  # noqa: E402
from karikomi.keras import prune_, shrink  # noqa: E402
from karikomi.keras.labelling.label_run import RULES  # noqa: E402
from karikomi.keras.shrinking import configs, proof  # noqa: E402
from karikomi.shrink.label_planes import Labelled  # noqa: E402
from keras_backends import BACKEND, only, sampled  # noqa: E402

Case = tuple[Callable[[Any], Any], list[int]]


def image(body: Callable[[Any], Any], channels: int = 3, side: int = 6) -> Any:
    inputs = keras.Input((side, side, channels))
    return keras.Model(inputs, body(inputs), name="net")


def sequence(body: Callable[[Any], Any], features: int = 8) -> Any:
    inputs = keras.Input((5, features))
    return keras.Model(inputs, body(inputs), name="net")


def tokens(body: Callable[[Any], Any]) -> Any:
    inputs = keras.Input((5,), dtype="int32")
    return keras.Model(inputs, body(layers.Embedding(11, 6, mask_zero=True)(inputs)), name="net")


def conv(filters: int, size: int = 1, **options: Any) -> Any:
    return layers.Conv2D(filters, size, **options)


def pooled(value: Any) -> Any:
    return layers.Dense(3)(layers.GlobalAveragePooling2D()(value))


def residual(x: Any) -> Any:
    stem = conv(8)(x)
    inner = layers.BatchNormalization()(conv(8, 3, padding="same")(layers.ReLU()(stem)))
    return pooled(layers.Add()([stem, inner]))


def shuffled(x: Any) -> Any:
    value = conv(16, groups=4)(conv(8)(x))
    value = layers.Permute((1, 2, 4, 3))(layers.Reshape((6, 6, 4, 4))(value))
    return conv(3)(layers.Reshape((6, 6, 16))(value))


def squeezed(x: Any) -> Any:
    value = conv(8)(x)
    gate = layers.Dense(4, "relu")(layers.GlobalAveragePooling2D()(value))
    gate = layers.Reshape((1, 1, 8))(layers.Dense(8, "sigmoid")(gate))
    return conv(3)(layers.Multiply()([value, gate]))


def option_a(x: Any) -> Any:
    value = conv(8, 3, padding="same", activation="relu")(x)
    shortcut = ops.pad(value[:, ::2, ::2, :], ((0, 0), (0, 0), (0, 0), (4, 4)))
    return conv(3)(layers.Add()([conv(16, 3, padding="same", strides=2)(value), shortcut]))


def gated(x: Any) -> Any:
    both = layers.Dense(16)(x)
    return layers.Dense(3)(both[..., :8] * ops.sigmoid(both[..., 8:]))


def fused_heads(x: Any) -> Any:
    value = ops.transpose(ops.reshape(layers.Dense(48)(x), (-1, 5, 3, 2, 8)), (2, 0, 3, 1, 4))
    query, key, value = (ops.squeeze(part, 0) for part in ops.split(value, 3))
    scores = ops.softmax(ops.matmul(query, ops.swapaxes(key, -1, -2)))
    mixed = ops.transpose(ops.matmul(scores, value), (0, 2, 1, 3))
    return layers.Dense(3)(ops.reshape(mixed, (-1, 5, 16)))


def attended(x: Any) -> Any:
    stem = layers.Dense(8)(x)
    mixed = layers.MultiHeadAttention(2, 6, value_dim=4)(stem, stem, use_causal_mask=True)
    return layers.Dense(3)(layers.LayerNormalization()(layers.Add()([stem, mixed])))


def one_key_head(x: Any) -> Any:
    stem = layers.Dense(8)(x)
    return layers.Dense(3)(stem + layers.GroupQueryAttention(4, 4, 2)(stem, stem))


def translated(x: Any) -> Any:
    _, hidden, cell = layers.LSTM(8, return_state=True)(x)
    return layers.Dense(3)(layers.LSTM(8)(x, initial_state=[hidden, cell]))


def nested(x: Any) -> Any:
    inputs = keras.Input((6, 6, 8))
    inner = keras.Sequential([keras.Input((6, 6, 8)), conv(12, activation="relu")])
    middle = keras.Model(inputs, layers.BatchNormalization()(inner(inputs)))
    return pooled(middle(conv(8)(x)))


def used_twice(x: Any) -> Any:
    shared = layers.Dense(8)
    return layers.Dense(3)(shared(ops.relu(shared(layers.Dense(8)(x)))))


# A network -> its widths when half of each group stays; the last layer, which makes the outputs, keeps all.
HALVED: dict[str, Case] = {
    "flatten": (
        lambda x: layers.Dense(3)(layers.Flatten()(conv(8, 3, activation="relu")(x))),
        [4, 3],
    ),
    "residual": (residual, [4, 4, 3]),
    "concatenate": (
        lambda x: conv(3)(layers.Concatenate()([layers.ReLU()(conv(4)(x)), conv(8)(x)])),
        [2, 4, 3],
    ),
    "groups": (lambda x: conv(3)(conv(16, groups=4)(conv(8)(x))), [4, 8, 3]),
    "channel shuffle": (shuffled, [4, 8, 3]),
    "depthwise": (
        lambda x: conv(3)(layers.ReLU()(layers.DepthwiseConv2D(3, depth_multiplier=2)(conv(8)(x)))),
        [4, 8, 3],
    ),
    "separable": (
        lambda x: conv(3)(layers.SeparableConv2D(8, 3, depth_multiplier=2)(conv(4)(x))),
        [2, 4, 3],
    ),
    "transposed": (
        lambda x: conv(3)(layers.Conv2DTranspose(8, 3, strides=2)(conv(4)(x))),
        [2, 4, 3],
    ),
    "squeeze and excite": (squeezed, [4, 2, 4, 3]),
    "zero-padded shortcut": (option_a, [4, 8, 3]),
    "group norm": (lambda x: conv(3)(layers.GroupNormalization(2)(conv(8)(x))), [4, 3]),
    "slopes": (lambda x: conv(3)(layers.PReLU(shared_axes=[1, 2])(conv(8)(x))), [4, 3]),
    "model in a model": (nested, [4, 6, 3]),
}
OF_SEQUENCES: dict[str, Case] = {
    "gate": (gated, [8, 3]),
    "fused heads": (fused_heads, [24, 3]),
    "attention": (attended, [4, 6, 6, 4, 4, 3]),
    "shared key heads": (one_key_head, [4, 8, 4, 4, 4, 3]),
    "layer used twice": (used_twice, [4, 4, 3]),
    "each step": (
        lambda x: layers.TimeDistributed(layers.Dense(3))(
            layers.TimeDistributed(layers.Dense(8, "relu"))(x)
        ),
        [4, 3],
    ),
    "softmax inside": (lambda x: layers.Dense(3)(layers.Dense(8, "softmax")(x)), [4, 3]),
    "einsum": (
        lambda x: layers.EinsumDense("abhd,hde->abe", output_shape=(None, 3))(
            layers.EinsumDense("abc,chd->abhd", output_shape=(None, 2, 8), bias_axes="hd")(x)
        ),
        [8, 3],
    ),
    "product": (
        lambda x: layers.Dot((2, 2))(
            [layers.Dense(8, "sigmoid")(x), layers.Dense(8, "sigmoid")(x)]
        ),
        [4, 4],
    ),
}
OF_TOKENS: dict[str, Case] = {
    "lstm": (lambda x: layers.Dense(3)(layers.LSTM(8)(x)), [3, 4, 3]),
    "gru": (lambda x: layers.Dense(3)(layers.GRU(8)(x)), [3, 4, 3]),
    "cell": (lambda x: layers.Dense(3)(layers.RNN(layers.SimpleRNNCell(8))(x)), [3, 4, 3]),
    "both directions": (
        lambda x: layers.Dense(3)(layers.Bidirectional(layers.LSTM(8))(x)),
        [3, 4, 4, 3],
    ),
    "states passed on": (translated, [3, 4, 4, 3]),
}
EVERY = [
    *((image, name, case) for name, case in HALVED.items()),
    *((sequence, name, case) for name, case in OF_SEQUENCES.items()),
    *((tokens, name, case) for name, case in OF_TOKENS.items()),
]


@pytest.mark.parametrize(
    ("kind", "case"),
    [pytest.param(kind, case, id=name) for kind, name, case in sampled(EVERY, "halved", most=2)],
)
def test_half_of_each_group_goes(kind: Callable[..., Any], case: Case) -> None:
    keras.utils.set_random_seed(0)
    body, widths = case
    small, report = shrink(kind(body), width=0.5)
    assert list(report.widths_after.values()) == widths
    assert report.max_difference <= 1e-5
    assert report.parameters_after == _floats(small) < report.parameters_before
    assert report.macs_after < report.macs_before


def _floats(model: Any) -> int:
    return sum(
        int(np.prod(v.shape))
        for v in model.weights
        if "moving" not in v.path and "seed" not in v.path
    )


def array(tensor: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def by_hand(**options: Any) -> Any:
    """Return a model of two inputs, four units of growing weights, and one output."""
    hidden = layers.Dense(4, name="hidden", **options)
    model = keras.Sequential([keras.Input((2,)), hidden, layers.Dense(1, name="head")], name="net")
    hidden.kernel.assign([[1.0, -4.0, 2.0, 3.0], [1.0, 4.0, -2.0, 3.0]])
    hidden.bias.assign([0.1, 0.2, 0.3, 0.4])
    model.get_layer("head").kernel.assign([[1.0], [2.0], [3.0], [4.0]])
    model.get_layer("head").bias.assign([0.5])
    return model


def test_what_stays_is_what_was_there() -> None:
    model = by_hand()
    small, report = shrink(model, width=0.5)
    # Magnitudes of columns and rows together: 1+1+1, 4+4+2, 2+2+3, 3+3+4: units 1 and 3 stay.
    np.testing.assert_array_equal(array(small.get_layer("hidden").kernel), [[-4, 3], [4, 3]])
    np.testing.assert_array_equal(array(small.get_layer("hidden").bias), np.float32([0.2, 0.4]))
    np.testing.assert_array_equal(array(small.get_layer("head").kernel), [[2], [4]])
    # 2 * (-4 + 8 + 0.2) + 4 * (3 + 6 + 0.4) + 0.5
    outputs = array(small(np.float32([[1.0, 2.0]])))
    np.testing.assert_allclose(outputs, [[2 * 4.2 + 4 * 9.4 + 0.5]], rtol=1e-6)
    assert (report.widths_before, report.widths_after) == (
        {"net/hidden": 4, "net/head": 1},
        {"net/hidden": 2, "net/head": 1},
    )
    assert (report.parameters_before, report.parameters_after) == (17, 9)
    assert (report.macs_before, report.macs_after) == (12, 6)
    assert report.frozen == {"net/head": "it has one unit"}
    # The model itself is as it was.
    assert model.get_layer("hidden").units == 4 and model.get_layer("head").kernel.shape == (4, 1)


@only("torch")
def test_attention_divides_by_the_root_of_its_old_width() -> None:
    """Columns of zeros go, and the outputs stay what they were, to rounding."""
    keras.utils.set_random_seed(1)
    attention = layers.MultiHeadAttention(2, 4, name="attention")
    inputs = keras.Input((5, 3))
    model = keras.Model(inputs, layers.Dense(2)(attention(inputs, inputs)))
    for part, axis in ((attention.query_dense, 2), (attention.key_dense, 2)):
        kernel = array(part.kernel).copy()
        np.moveaxis(kernel, axis, 0)[[0, 2]] = 0.0
        part.kernel.assign(kernel)
    values = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")
    expected = array(model(values))
    small, _ = shrink(model, width=0.5, only=["*/query/*", "*/key/*"])
    own = small.get_layer("attention")
    assert (own.num_heads, own.key_dim, own.value_dim) == (2, 2, 4)
    np.testing.assert_allclose(array(small(values)), expected, rtol=1e-5, atol=1e-6)


@only("torch")
@pytest.mark.parametrize(
    ("body", "widths"),
    [
        # 2 heads of 6 and 4: one stays.
        (attended, [4, 6, 6, 4, 4, 3]),
        # 4 heads of queries share 2 of keys and values, of width 4.
        (one_key_head, [4, 8, 4, 4, 4, 3]),
        (fused_heads, [24, 3]),
    ],
)
def test_whole_heads_go(body: Callable[[Any], Any], widths: list[int]) -> None:
    small, report = shrink(sequence(body), heads=0.5)
    assert list(report.widths_after.values()) == widths
    found = [layer for layer in small.layers if "attention" in layer.name]
    if body is attended:
        assert [(own.num_heads, own.key_dim, own.value_dim) for own in found] == [(1, 6, 4)]
    if body is one_key_head:
        config = found[0].get_config()
        assert [
            config[name] for name in ("num_query_heads", "num_key_value_heads", "head_dim")
        ] == [
            2,
            1,
            4,
        ]


@only("torch")
def test_statistics_are_named() -> None:
    report = shrink(sequence(attended), width=0.5)[1]
    assert [site.split(" ")[1] for site in report.statistics] == ["(LayerNormalization)"]
    assert shrink(image(residual), width=0.5)[1].statistics == []
    # A softmax over the outputs, which all stay, is none.
    head = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(3, "softmax")])
    assert shrink(head, width=0.5)[1].statistics == []


@only("torch")
@pytest.mark.parametrize("target", ["parameters", "macs", "bytes"])
def test_a_budget_is_kept(target: str) -> None:
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(16), layers.Dense(12), layers.Dense(3)]
    )
    before, after = {
        "parameters": ("parameters_before", "parameters_after"),
        "macs": ("macs_before", "macs_after"),
        "bytes": ("parameters_before", "parameters_after"),
    }[target]
    whole = {"parameters": 355, "macs": 324, "bytes": 4 * 355}[target]
    for value in (0.5, whole // 2):
        report = shrink(model, **{target: value})[1]
        assert getattr(report, before) == whole // (4 if target == "bytes" else 1)
        assert 0.35 <= getattr(report, after) / getattr(report, before) <= 0.5
    with pytest.raises(
        InvalidArgument, match=rf"keras\.shrink: {target}: no choice of units is as small"
    ):
        shrink(model, **{target: 5})


@only("torch")
def test_macs_by_hand() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            conv(8, 3),  # 4 x 4 places, 9 x 2 x 8
            layers.DepthwiseConv2D(2),  # 3 x 3 places, 4 x 8
            layers.Conv2DTranspose(4, 2, strides=2),  # from 3 x 3 places, 4 x 4 x 8
            layers.Reshape((36, 4)),
            layers.LSTM(6),  # 36 steps, (4 + 6) x 24
            layers.Dense(3),  # 6 x 3
        ]
    )
    _, report = shrink(model, width=0.5)
    assert report.macs_before == 16 * 144 + 9 * 32 + 9 * 128 + 36 * 240 + 18
    assert report.macs_after == 16 * 72 + 9 * 16 + 9 * 32 + 36 * 60 + 9


@only("torch")
def test_what_was_set_stays_set() -> None:
    inputs = keras.Input((4,))
    value = layers.Dense(8, "relu", name="hidden", kernel_regularizer="l2")(inputs)
    value = layers.BatchNormalization(name="norm", trainable=False)(value)
    model = keras.Model(inputs, layers.Dense(2, name="head", dtype="float64")(value), name="net")
    model.compile(keras.optimizers.SGD(0.25), "mse")
    small, _ = shrink(model, width=0.5)
    assert (small.name, small.get_layer("norm").trainable, small.get_layer("head").dtype) == (
        "net",
        False,
        "float64",
    )
    assert float(small.optimizer.learning_rate) == 0.25 and small.loss == "mse"
    assert isinstance(small.get_layer("hidden").kernel_regularizer, keras.regularizers.L2)
    small.fit(np.ones((4, 4)), np.ones((4, 2)), verbose=0)


@only("torch")
def test_seen_data_stay_with_a_normalization() -> None:
    norm = layers.Normalization()
    norm.adapt(np.float32([[0.0, 10.0], [2.0, 30.0]]))
    model = keras.Sequential([keras.Input((2,)), norm, layers.Dense(8), layers.Dense(1)])
    small, _ = shrink(model, width=1.0)
    values = np.float32([[1.0, 5.0]])
    np.testing.assert_allclose(array(small(values)), array(model(values)), rtol=1e-6)


@only("torch")
@pytest.mark.parametrize(
    ("multiple", "least", "width"), [(1, 1, 3), (4, 1, 4), (1, 7, 7), (16, 1, 10)]
)
def test_rounding(multiple: int, least: int, width: int) -> None:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(10), layers.Dense(2)])
    report = shrink(model, width=0.3, multiple_of=multiple, least=least)[1]
    assert next(iter(report.widths_after.values())) == width


@only("torch")
def test_only_and_exclude_choose_kernels() -> None:
    model = image(residual)
    names = [layer.name for layer in model.layers if isinstance(layer, layers.Conv2D)]
    inner = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, name="a"),
            layers.BatchNormalization(),
            layers.Dense(6, name="b"),
            layers.Dense(2),
        ]
    )
    # The normalisation that follows needs no mention.
    assert list(shrink(inner, width=0.5, only="*/a/*")[1].widths_after.values()) == [4, 6, 2]
    assert list(shrink(inner, width=0.5, exclude="*/a/*")[1].widths_after.values()) == [8, 3, 2]
    # Both convolutions make the units of one group: it goes with both or not at all.
    with pytest.raises(Unsupported, match="no unit can go"):
        shrink(model, width=0.5, only=f"*{names[0]}/*")
    with pytest.raises(UnknownName):
        shrink(model, width=0.5, only="*/nothing/*")


@only("torch")
@pytest.mark.parametrize("score", ["taylor", "apoz", "wanda", "random", "fpgm"])
def test_scores_with_data(score: str) -> None:
    data = [(np.random.default_rng(0).normal(size=(8, 2)).astype("float32"), np.ones((8, 1)))]
    model = by_hand(activation="relu")
    small, report = shrink(
        model, width=0.5, score=score, data=data, loss=keras.losses.MeanSquaredError()
    )
    assert small.get_layer("hidden").units == 2 and report.removed == 2


@only("torch")
def test_units_whose_outputs_are_always_zero_go_first() -> None:
    model = by_hand(activation="relu")
    # Unit 1 has the largest weights, but with this bias it never fires.
    model.get_layer("hidden").bias.assign([9.0, -99.0, 9.0, 9.0])
    data = [(np.float32([[0.1, 0.2], [0.3, 0.1]]), None)]
    small, _ = shrink(model, width=0.75, score="apoz", data=data)
    np.testing.assert_array_equal(array(small.get_layer("hidden").kernel), [[1, 2, 3], [1, -2, 3]])


@only("torch")
def test_masked_units_go_first() -> None:
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dense(2)])
    prune_(model, width=0.5, pattern="units")
    values = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    small, _ = shrink(model, width=0.5)
    np.testing.assert_allclose(array(small(values)), array(model(values)), rtol=1e-5, atol=1e-6)


class Own(layers.Layer):
    def call(self, inputs: Any) -> Any:
        return ops.flip(inputs, -1)


class OwnDense(layers.Dense):
    def call(self, inputs: Any) -> Any:
        return ops.flip(super().call(inputs), -1)


@only("torch")
@pytest.mark.parametrize(
    ("layer", "frozen"),
    [
        (
            lambda: layers.Lambda(_twice, output_shape=(8,)),
            "rule for this layer or operation: own (Lambda)",
        ),
        (lambda: Own(name="own"), "rule for this layer or operation: own (Own)"),
        (lambda: OwnDense(8, name="own"), "rule for this layer or operation: own (OwnDense)"),
        (
            lambda: layers.Activation(_twice, name="own"),
            "rule for the activation of own (Activation)",
        ),
    ],
)
def test_what_no_rule_covers_stays_and_is_named(layer: Callable[[], Any], frozen: str) -> None:
    unknown = layer()
    unknown.name = "own"
    inputs = keras.Input((4,))
    value = layers.Dense(6, "relu", name="before")(inputs)
    value = unknown(layers.Dense(8, name="into")(value))
    model = keras.Model(inputs, layers.Dense(2, name="head")(value))
    small, report = shrink(model, width=0.5)
    assert [small.get_layer(name).units for name in ("before", "into")] == [3, 8]
    assert report.frozen["into"].endswith(frozen)


def _twice(value: Any) -> Any:
    return 2 * value


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.head = layers.Dense(2)

    def call(self, inputs: Any) -> Any:
        return self.head(inputs)


def _subclassed() -> Any:
    model = Subclassed()
    model(np.ones((1, 4)))
    return model


def _quantized() -> Any:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(2)])
    for layer in model.layers:
        layer.quantize("int8")
    return model


def _with_lora() -> Any:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, name="d"), layers.Dense(2)])
    model.get_layer("d").enable_lora(2)
    return model


@only("torch")
@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (
            _subclassed,
            {},
            Unsupported,
            r"subclassed.*got Subclassed.*keras\.Model\(inputs, outputs\)",
        ),
        (_quantized, {}, Unsupported, "quantized or have LoRA.*shrink before quantizing"),
        (_with_lora, {}, Unsupported, "quantized or have LoRA"),
        (
            lambda: keras.Sequential([layers.Dense(2)]),
            {},
            InvalidArgument,
            r"no variables yet.*build",
        ),
        (lambda: np.ones(3), {}, InvalidArgument, "not a Keras model.*ndarray"),
        (
            by_hand,
            {"macs": 0.5},
            InvalidArgument,
            "one target is to be given; got width=0.5, macs=0.5",
        ),
        (by_hand, {"width": 1.5}, InvalidArgument, r"share.*got 1\.5.*\(0, 1\]"),
        (by_hand, {"width": 0.0}, InvalidArgument, "share"),
        (by_hand, {"multiple_of": 0}, InvalidArgument, "multiple_of.*whole number >= 1"),
        (by_hand, {"allocation": "uniformly"}, UnknownName, "unknown allocation"),
        (by_hand, {"score": "sparsegpt"}, Unsupported, "re-fits"),
        (
            lambda: keras.Sequential([keras.Input((4,)), layers.Dense(2)]),
            {},
            Unsupported,
            "no unit can go.*outputs of the network",
        ),
    ],
)
def test_refused(
    model: Callable[[], Any], options: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        shrink(model(), **{"width": 0.5, **options})


@only("torch")
def test_loads_without_karikomi(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = image(nested)
    small, _ = shrink(model, width=0.5)
    values = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype("float32")
    small.save(tmp_path / "small.keras")
    with zipfile.ZipFile(tmp_path / "small.keras") as file:
        assert b"karikomi" not in file.read("config.json")  # names every class that is looked up
    net = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(array(net(values)), array(small(values)), rtol=1e-6)


def _reversed(rule: Any) -> Any:
    """Return a rule that mixes up the indices of what it returns."""

    def wrong(run: Any, call: Any) -> Any:
        found = rule(run, call)
        return Labelled(found.shape, tuple(np.roll(plane, 1, -1) for plane in found.planes))

    return wrong


# A rule that is planted wrong -> a network that uses it.
WRONG = {
    "layers.Concatenate": (image, HALVED["concatenate"][0]),
    "layers.Reshape": (image, shuffled),
    "layers.Flatten": (image, HALVED["flatten"][0]),
    "layers.DepthwiseConv2D": (image, HALVED["depthwise"][0]),
    "layers.BatchNormalization": (image, residual),
    "layers.GlobalAveragePooling2D": (image, residual),
    "layers.LSTM": (tokens, OF_TOKENS["lstm"][0]),
    "layers.Bidirectional": (tokens, OF_TOKENS["both directions"][0]),
    "ops.GetItem": (sequence, gated),
}


@only("torch")
@pytest.mark.parametrize("name", WRONG)
def test_the_proof_finds_a_wrong_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keras.utils.set_random_seed(0)
    kind, body = WRONG[name]
    monkeypatch.setitem(RULES, name, _reversed(RULES[name]))
    with pytest.raises(
        Unsupported, match="would differ|other shapes|same along each axis|do not fit together"
    ):
        shrink(kind(body), width=0.5, score="random")


@only("torch")
def test_the_proof_finds_a_lost_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_keep_scale", lambda *_: None)
    with pytest.raises(Unsupported, match="would differ"):
        shrink(sequence(attended), width=0.5)


@only("torch")
def test_the_proof_sees_past_a_sure_softmax() -> None:
    """Outputs that hardly depend on the inputs would hide every difference."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8), layers.Dense(3, "softmax")])
    model.layers[-1].bias.assign([500.0, 0.0, 0.0])
    wrong = RULES["layers.Dense"]

    def rolled(run: Any, call: Any) -> Any:
        return _reversed(wrong)(run, call) if call.operation.units == 8 else wrong(run, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RULES, "layers.Dense", rolled)
        with pytest.raises(Unsupported, match="would differ"):
            shrink(model, width=0.5)
    assert shrink(model, width=0.5)[1].max_difference <= 1e-5


def test_each_backend_shrinks() -> None:
    assert keras.backend.backend() == BACKEND
    small, report = shrink(image(residual), width=0.5)
    assert small.layers[1].filters == 4 and report.max_difference <= 1e-5


@only("jax")
def test_attention_of_jax_keeps_one_width() -> None:
    inputs = keras.Input((5, 4))
    attention = layers.MultiHeadAttention(1, 6, name="attention")
    model = keras.Model(inputs, layers.Dense(2)(attention(inputs, inputs)))
    attention.value_dense.kernel.assign(9 * attention.value_dense.kernel)
    small, _ = shrink(model, width=0.5, allocation="global")
    own = small.get_layer("attention")
    assert own.key_dim == own.value_dim < 6


@only("torch")
def test_inputs_of_unknown_size_can_be_given() -> None:
    inputs = keras.Input((None, 4))
    value = layers.Reshape((-1, 3, 8))(layers.Dense(8, name="hidden")(inputs))
    model = keras.Model(inputs, layers.Dense(2)(value))
    # 32 steps, as random inputs have where none are known, are no multiple of 3.
    with pytest.raises(InvalidArgument, match="does not run on the inputs of the proof.*inputs="):
        shrink(model, width=0.5)
    small, _ = shrink(model, width=0.5, inputs=np.ones((2, 6, 4), "float32"))
    assert small.get_layer("hidden").units == 4
    # Steps and features mix here, in a way that depends on the number of steps.
    mixed = layers.Reshape((2, -1, 4))(layers.Dense(8)(inputs))
    with pytest.raises(Unsupported, match="a size that is not known is merged with others"):
        shrink(keras.Model(inputs, layers.Dense(2)(mixed)), width=0.5)


@only("torch")
def test_nan_in_one_output_is_not_hidden_by_another() -> None:
    right, wrong = np.float32([1.0, 2.0]), np.float32([1.0, np.nan])
    assert np.isnan(proof.apart([right, right], [wrong, right]))
    assert np.isnan(proof.apart([right, right], [right, wrong]))
    assert proof.apart([right], [np.float32([1.0, 1.5])]) == 0.25
