"""Compensation of a shrink in Keras: what is left is the least-squares fit to the dense model, where that helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
layers, ops = keras.layers, keras.ops

from karikomi.errors import InvalidArgument  # noqa: E402
from karikomi.keras import shrink  # noqa: E402
from karikomi.keras.shrinking import costs, smaller_copy  # noqa: E402
from karikomi.reconstruction.affine_fit import DAMPING  # noqa: E402
from karikomi.shrink import refit_outcome  # noqa: E402
from keras_backends import only, sampled  # noqa: E402


@pytest.fixture(autouse=True)
def _seed() -> None:
    keras.utils.set_random_seed(0)


def batches(*shape: int, size: int = 16, count: int = 5) -> list[Any]:
    """Return batches of inputs, of which the fifth is held out."""
    generator = np.random.default_rng(0)
    return [generator.normal(size=(size, *shape)).astype("float32") for _ in range(count)]


def array(tensor: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(tensor)).astype(np.float64)


def distance(model: Any, small: Any, inputs: np.ndarray) -> float:
    expected, found = array(model(inputs)), array(small(inputs))
    return float(np.square(expected - found).sum() / np.square(expected).sum()) ** 0.5


def net(body: Callable[[Any], Any], *shape: int) -> Any:
    inputs = keras.Input(shape)
    return keras.Model(inputs, body(inputs))


@only("torch")
def test_the_layer_behind_is_the_damped_fit_with_its_bias() -> None:
    model = net(lambda x: layers.Dense(2)(layers.Dense(8, "relu")(x)), 4)
    data = batches(4)
    small, report = shrink(model, width=0.5, data=data)
    first, last = small.layers[1:]
    x = np.concatenate(data[:4])
    left, targets = array(first(x)), array(model(x))
    start = array(shrink(model, width=0.5)[0].layers[-1].kernel)
    means = left.mean(0), targets.mean(0)
    gram = (left - means[0]).T @ (left - means[0])
    # The mean diagonal of the centred products.
    damping = DAMPING * np.trace(gram) / len(gram) * np.eye(len(gram))
    cross = (left - means[0]).T @ (targets - means[1])
    expected = np.linalg.solve(gram + damping, cross + damping @ start)
    np.testing.assert_allclose(array(last.kernel), expected, atol=1e-4)
    np.testing.assert_allclose(array(last.bias), means[1] - means[0] @ expected, atol=1e-4)
    assert [refit.kept for refit in report.compensation.values()] == [True, True]


def normed(x: Any) -> Any:
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", use_bias=False)(x))
    x = layers.BatchNormalization()(layers.Conv2D(8, 3, use_bias=False)(layers.ReLU()(x)))
    return layers.Dense(3)(layers.GlobalAveragePooling2D()(layers.ReLU()(x)))


def residual(x: Any) -> Any:
    stem = layers.Conv2D(4, 1)(x)
    inner = layers.Conv2D(4, 3, padding="same")(
        layers.Conv2D(16, 3, padding="same", activation="relu")(stem)
    )
    value = layers.Add()([stem, layers.Dropout(0.5)(inner)])
    inner = layers.Conv2D(4, 1, use_bias=False)(layers.Conv2D(16, 1, activation="relu")(value))
    value = value + layers.BatchNormalization()(inner)
    return layers.Conv2D(2, 1)(value)


def separable(x: Any) -> Any:
    x = layers.SeparableConv2D(16, 3, activation="relu", padding="same")(
        layers.Conv2D(8, 1, activation="relu")(x)
    )
    x = layers.DepthwiseConv2D(3, strides=2, depth_multiplier=2, activation="relu")(x)
    return layers.Conv2DTranspose(3, 3, strides=2)(x)


def grouped(x: Any) -> Any:
    return layers.Conv2D(4, 3, groups=2)(layers.Conv2D(16, 1, activation="relu", groups=1)(x))


def first_channels(x: Any) -> Any:
    x = layers.Permute((3, 1, 2))(x)
    x = layers.Conv2D(16, 1, activation="relu", data_format="channels_first")(x)
    return layers.Conv2D(4, 3, data_format="channels_first")(x)


def attended(x: Any) -> Any:
    value = layers.LayerNormalization()(x)
    value = value + layers.MultiHeadAttention(2, 8)(value, value)
    inner = layers.Dense(8)(layers.Dense(32, activation="gelu")(value))
    return layers.Dense(3)(layers.Add()([value, inner]))


def recurrent(kind: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
    return lambda x: layers.Dense(3)(kind(16, return_sequences=True, **options)(layers.Dense(8)(x)))


def nested(x: Any) -> Any:
    inside = net(lambda y: layers.Dense(6)(layers.Dense(16, "relu")(y)), 5)
    return layers.Dense(3)(layers.Activation("tanh")(inside(x)))


KINDS: list[tuple[Callable[[Any], Any], tuple[int, ...]]] = [
    (normed, (7, 7, 3)),
    (residual, (6, 6, 3)),
    (separable, (7, 7, 3)),
    (grouped, (6, 6, 3)),
    (attended, (6, 8)),
    (nested, (5,)),
    (recurrent(layers.LSTM), (6, 5)),
    (recurrent(layers.GRU), (6, 5)),
    (recurrent(layers.GRU, reset_after=False, go_backwards=True), (6, 5)),
    (recurrent(layers.SimpleRNN, use_bias=False), (6, 5)),
    (lambda x: layers.Dense(3)(layers.Bidirectional(layers.LSTM(16))(x)), (6, 5)),
]


@pytest.mark.parametrize(("body", "shape"), sampled(KINDS, "compensation", most=3))
def test_it_comes_nearer_to_the_dense_model(
    body: Callable[[Any], Any], shape: tuple[int, ...]
) -> None:
    model, data = net(body, *shape), batches(*shape, size=24)
    before = [array(variable) for variable in model.weights]
    small, report = shrink(model, width=0.5, data=data)
    plain, _ = shrink(model, width=0.5, data=data, compensate=False)
    whole, fresh = report.compensation[""], np.random.default_rng(1).normal(size=(64, *shape))
    assert whole.kept and whole.after < 0.8 * whole.before
    assert distance(model, small, fresh) < 0.85 * distance(model, plain, fresh)
    assert all(refit.after < refit.before for refit in report.compensation.values() if refit.kept)
    for variable, values in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(array(variable), values)


@only("torch")
def test_a_summand_takes_what_the_other_lacks() -> None:
    """What a narrow branch has lost is given back by the other one, which reads all of the inputs."""

    def body(x: Any) -> Any:
        lossy = layers.Dense(3, use_bias=False)(layers.Dense(8, name="inner")(x))
        return layers.Add()([layers.Dropout(0.1)(lossy), layers.Dense(3, name="branch")(x)])

    model, data = net(body, 4), batches(4)
    small, report = shrink(model, width=0.5, data=data, only="inner/*")
    fresh = np.random.default_rng(1).normal(size=(64, 4))
    plain, _ = shrink(model, width=0.5, only="inner/*")
    assert distance(model, small, fresh) < 0.2 * distance(model, plain, fresh)
    assert report.compensation["branch"].kept


@only("torch")
def test_a_batch_normalization_behind_no_kernel_is_re_estimated() -> None:
    def body(x: Any) -> Any:
        x = ops.sum(layers.Dense(16, "relu")(x), axis=-1, keepdims=True)
        return layers.Dense(3)(layers.BatchNormalization(name="norm")(x))

    model, data = net(body, 4), batches(4, size=64)
    norm = model.get_layer("norm")
    values = array(keras.Model(model.input, norm.input)(np.concatenate(data)))
    norm.moving_mean.assign(values.mean(0))
    norm.moving_variance.assign(values.var(0))
    small, report = shrink(model, width=0.5, data=data)
    own = small.get_layer("norm")
    left = array(keras.Model(small.input, own.input)(np.concatenate(data[:4])))
    assert report.compensation["norm"].kept
    np.testing.assert_allclose(array(own.moving_mean), left.mean(0), atol=1e-4)
    np.testing.assert_allclose(array(own.moving_variance), left.var(0), atol=1e-4)


@only("torch")
def test_constants_do_not_cross_an_activation() -> None:
    def body(x: Any) -> Any:
        x = layers.Dense(8, "relu", use_bias=False)(layers.Dense(16, "relu")(x))
        return layers.Dense(3)(layers.BatchNormalization(name="norm")(x))

    model, data = net(body, 4), batches(4, size=64)
    report = shrink(model, width=0.5, data=data)[1]
    kept = [refit.kept for name, refit in report.compensation.items() if "dense" in name]
    assert kept[0] and "norm" in report.compensation, (
        "its mean takes no constant, and is judged itself"
    )


@only("torch")
def test_nothing_is_kept_if_the_loss_is_no_better() -> None:
    model, data = net(lambda x: layers.Dense(2)(layers.Dense(8, "relu")(x)), 4), batches(4)
    pairs = [(inputs, array(model(inputs))) for inputs in data]

    def further(outputs: Any, targets: Any) -> Any:
        return -ops.mean(ops.square(outputs - ops.cast(targets, outputs.dtype)))

    small, report = shrink(model, width=0.5, data=pairs, loss=further)
    plain, _ = shrink(model, width=0.5)
    assert [refit.kept for refit in report.compensation.values()] == [False, False]
    assert refit_outcome.NO_BETTER in [refit.why for refit in report.compensation.values()]
    for own, other in zip(small.weights, plain.weights, strict=True):
        np.testing.assert_array_equal(array(own), array(other))


def shared(x: Any) -> Any:
    own = layers.Dense(8, name="own")
    return own(own(layers.Dense(8, "relu")(layers.Dense(16, "relu")(x))))


def timed(x: Any) -> Any:
    return layers.TimeDistributed(layers.Dense(3, name="timed"))(layers.Dense(8)(x))


def bounded(x: Any) -> Any:
    own = layers.Dense(3, name="bounded", kernel_constraint=keras.constraints.NonNeg())
    return own(layers.Dense(8)(x))


def masked(x: Any) -> Any:
    return layers.LSTM(3, name="masked")(layers.Embedding(9, 8, mask_zero=True)(ops.abs(x)))


@only("torch")
@pytest.mark.parametrize(
    ("body", "shape", "name", "why"),
    [
        (shared, (8,), "own", "several times"),
        (timed, (5, 4), "timed", "TimeDistributed"),
        (bounded, (4,), "bounded", "constraint"),
        (masked, (5,), "masked", "masked"),
    ],
)
def test_what_is_not_tried_has_its_reason(
    body: Callable[[Any], Any], shape: tuple[int, ...], name: str, why: str
) -> None:
    report = shrink(net(body, *shape), width=0.5, data=batches(*shape, size=4))[1]
    assert any(name in layer and why in refit.why for layer, refit in report.compensation.items())


@only("torch")
def test_data_that_cannot_be_divided_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(lambda x: layers.Dense(2)(layers.Dense(8)(x)), None, 4)
    with pytest.raises(InvalidArgument, match="one example"):
        shrink(model, width=0.5, data=batches(5, 4, size=1, count=1))
    with pytest.raises(InvalidArgument, match="different shapes"):
        shrink(model, width=0.5, data=[*batches(5, 4), *batches(6, 4)])
    single = shrink(model, width=0.5, data=batches(5, 4, count=1))[1]
    assert single.compensation[""].kept
    monkeypatch.setattr(refit_outcome, "MOST_INPUTS", 3)
    report = shrink(model, width=0.5, data=batches(5, 4))[1]
    assert "4 inputs" in next(refit.why for refit in report.compensation.values() if refit.why)


@only("torch")
def test_half_precision_and_several_inputs_and_frozen_layers() -> None:
    first, second = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    hidden = layers.Dense(16, "relu", dtype="mixed_bfloat16")(layers.Concatenate()([first, second]))
    model = keras.Model(
        {"a": first, "b": second}, layers.Dense(3, dtype="bfloat16", trainable=False)(hidden)
    )
    data = [({"a": x, "b": x[::-1]},) for x in batches(4, size=32)]
    small, report = shrink(model, width=0.5, data=data)
    assert report.compensation[""].kept and not small.layers[-1].trainable


def test_milliseconds_are_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured ones decide: here they are as many as there are parameters."""
    model = net(lambda x: layers.Dense(2)(layers.Dense(64, "relu")(x)), 4)
    monkeypatch.setattr(smaller_copy, "milliseconds", lambda small, _: float(small.count_params()))
    _, report = shrink(model, ms=225)
    assert 0.3 * 450 < report.parameters_after <= 0.5 * 450
    assert len(report.latencies) > 2 and report.ms_before and report.ms_after


def test_a_model_is_measured_and_left_as_it_was() -> None:
    model = net(lambda x: layers.Dense(2)(x), 4)
    assert 0 < costs.milliseconds(model, np.ones((2, 4), "float32"), runs=3)
    assert model.predict_function is None
    assert "faster" in str(
        shrink(net(lambda x: layers.Dense(2)(layers.Dense(8)(x)), 4), width=0.5)[1]
    )
