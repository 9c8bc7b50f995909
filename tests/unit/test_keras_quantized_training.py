"""Quantized training in Keras on each backend: what the model sees, what gradients train, what else a call changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
layers = keras.layers

import karikomi as kk  # noqa: E402
from karikomi.errors import InvalidArgument, UnknownName, Unsupported  # noqa: E402
from karikomi.keras import quantized_training  # noqa: E402
from karikomi.quantize import uniform  # noqa: E402

RNG = np.random.default_rng(5)
X = RNG.normal(size=(16, 6)).astype("float32")
Y = (X @ RNG.normal(size=(6, 3))).astype("float32")


def array(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable), dtype=np.float32)


def network(penalty: str | None = "l2", **options: Any) -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "relu", activity_regularizer=penalty, name="hidden", **options),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.2),
            layers.Dense(3, name="head"),
        ],
        name="net",
    )


def test_gradients_of_the_rounded_weights_train_the_weights() -> None:
    keras.utils.set_random_seed(1)
    layer = layers.Dense(3, use_bias=False, name="head")
    model = keras.Sequential([keras.Input((6,)), layer], name="net")
    before = array(layer.kernel)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    training = quantized_training(model, bits=3)
    assert training.rounded == ["net/head/kernel"]
    model.fit(X, Y, batch_size=16, verbose=0)
    rounded = uniform(before, bits=3, axis=1).decode()
    assert not np.allclose(rounded, before, atol=0.01)
    gradient = 2 * X.T @ (X @ rounded - Y) / Y.size
    assert np.allclose(array(layer.kernel), before - 0.1 * gradient, atol=1e-5)
    after = uniform(array(layer.kernel), bits=3, axis=1)
    assert np.allclose(model.predict(X, verbose=0), X @ after.decode(), atol=1e-5)
    coded = training.finish_()
    assert np.array_equal(coded["net/head/kernel"].codes, after.codes)
    assert np.array_equal(array(layer.kernel), after.decode())
    assert "call" not in vars(model)


def test_what_else_a_call_changes_is_kept_and_files_have_the_codes(tmp_path: Path) -> None:
    model, plain = network(), network()
    for each in (model, plain):
        each.compile(keras.optimizers.Adam(0.01), "mse")
    loss = plain.evaluate(X, Y, verbose=0)
    training = quantized_training(model, bits=8, exclude="*/head/*")
    assert training.left_alone["net/head/kernel"] == "not selected"
    assert training.left_alone["net/norm/gamma"] == "a vector"
    # The penalty on activities is in the loss, and eight bits change it little.
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(loss, rel=0.05)
    for each in (model, plain):
        each.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    statistics = [array(each.get_layer("norm").moving_mean) for each in (model, plain)]
    assert np.abs(statistics[0]).max() > 0 and np.allclose(*statistics, atol=0.02)
    seeds = [array(each.layers[2].seed_generator.state) for each in (model, plain)]
    assert np.array_equal(*seeds)
    seen = model.predict(X, verbose=0)
    coded = training.finish_()
    assert "net/head/kernel" not in coded and coded["net/hidden/kernel"].grid.bits == 8
    assert np.allclose(model.predict(X, verbose=0), seen, atol=1e-2)
    filled = kk.load(kk.save(model, tmp_path / "m.karikomi"), into=network())
    assert np.array_equal(filled.predict(X, verbose=0), model.predict(X, verbose=0))


def test_masks_hold_and_mixed_precision_rounds_what_is_stored() -> None:
    model = network(None, dtype="mixed_bfloat16")
    model.compile(keras.optimizers.Adam(0.01), "mse")
    masks = kk.keras.prune_(model, sparsity=0.5)
    training = quantized_training(model, bits=4)
    pruning = kk.keras.Pruning(masks=masks)
    model.fit(X, Y, verbose=0, callbacks=[pruning])
    kk.keras.strip_(model)
    stored = array(model.get_layer("hidden").kernel)
    coded = training.finish_()
    assert np.array_equal(coded["net/hidden/kernel"].codes, uniform(stored, bits=4, axis=1).codes)
    assert all(not array(v)[~mask].any() for v, mask in masks.pairs(model.weights))


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="build"):
        quantized_training(keras.Sequential([layers.Dense(2)]))
    model = network()
    with pytest.raises(InvalidArgument, match="bits out of range"):
        quantized_training(model, bits=1)
    with pytest.raises(UnknownName):
        quantized_training(model, only="nothing")
    training = quantized_training(model)
    with pytest.raises(Unsupported, match="is in quantized training; finish_"):
        quantized_training(model)
    training.finish_()
    with pytest.raises(Unsupported, match="finished"):
        training.finish_()
    norm = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    with pytest.raises(Unsupported, match="no weight to round"):
        quantized_training(norm)
