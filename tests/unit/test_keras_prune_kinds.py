"""Which variables of Keras layers are pruned: recurrent kernels, those that custom layers declare, named ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
layers = keras.layers

import karikomi as kk  # noqa: E402
from karikomi.errors import InvalidArgument  # noqa: E402
from karikomi.keras import Pruning, prune_, scores  # noqa: E402
from keras_backends import sampled  # noqa: E402

SERIES = np.random.default_rng(0).normal(size=(6, 5, 4)).astype("float32")
FRAMES = np.random.default_rng(0).normal(size=(2, 3, 5, 5, 2)).astype("float32")
KINDS: dict[str, tuple[Any, np.ndarray]] = {
    "LSTM": (lambda: layers.LSTM(3), SERIES),
    "GRU": (lambda: layers.GRU(3), SERIES),
    "SimpleRNN": (lambda: layers.SimpleRNN(3), SERIES),
    "cells": (lambda: layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)]), SERIES),
    "both ways": (lambda: layers.Bidirectional(layers.LSTM(3)), SERIES),
    "ConvLSTM2D": (lambda: layers.ConvLSTM2D(3, 2), FRAMES),
}


def model_of(make: Any, inputs: np.ndarray) -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input(inputs.shape[1:]), make(), layers.Flatten(), layers.Dense(2)]
    )
    model.build((None, *inputs.shape[1:]))
    return model


def array(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable))


@pytest.mark.parametrize("kind", sampled(KINDS, "kinds"))
def test_recurrent_kernels_go_as_in_torch(kind: str) -> None:
    model = model_of(*KINDS[kind])
    kernels = {v.path: v for v in model.weights if v.name in ("kernel", "recurrent_kernel")}
    dense = {path: array(v) for path, v in kernels.items()}
    masks = prune_(model, 0.5, data=[KINDS[kind][1]])
    assert set(masks) == set(kernels)
    # As one ranking by magnitude of all in the layout of torch: units first.
    flat = np.concatenate([np.moveaxis(w, (-1, -2), (0, 1)).reshape(-1) for w in dense.values()])
    order = np.argsort(np.abs(flat), kind="stable")
    stays = np.ones(flat.size, bool)
    stays[order[: round(0.5 * flat.size)]] = False
    found = np.concatenate([np.moveaxis(m, (-1, -2), (0, 1)).reshape(-1) for m in masks.values()])
    assert (found == stays).all()
    assert all((array(kernels[path])[~mask] == 0).all() for path, mask in masks.items())
    assert all(row.output_error is not None for row in masks.account.rows)


def test_recurrent_kernels_stay_where_rows_must_be_units_or_inputs_seen() -> None:
    model = model_of(*KINDS["LSTM"])
    for asked in (
        {"width": 0.5, "pattern": "units", "protect": ("recurrent",)},
        {"sparsity": 0.5, "score": "wanda"},
    ):
        masks = prune_(model, data=[SERIES], **asked)
        assert len(masks) <= 2 and not any("lstm" in name and "kernel" in name for name in masks)
    with_pattern = prune_(model, pattern=kk.prune.NofM(keep=2, of=4, pad=True))
    assert any("recurrent_kernel" in name for name in with_pattern)


def test_recurrent_kernels_while_training() -> None:
    model = model_of(*KINDS["GRU"])
    model.compile("adam", "mse")
    pruning = Pruning(kk.prune.OneShot(0.75))
    model.fit(SERIES, np.ones((6, 2)), batch_size=3, verbose=0, callbacks=[pruning])
    assert pruning.masks.sparsity == 52 / 69
    assert sum("recurrent_kernel" in name for name in pruning.masks) == 1


class Mixing(layers.Layer):
    """A layer with two tables, of which one may go."""

    def build(self, shape: Any) -> None:
        size = (shape[-1], shape[-1])
        self.table = self.add_weight(shape=size, initializer="glorot_uniform", name="table")
        self.other = self.add_weight(shape=size, initializer="glorot_uniform", name="other")

    def call(self, inputs: Any) -> Any:
        return keras.ops.matmul(keras.ops.matmul(inputs, self.table), self.other)


class Speaking(Mixing):
    """Names its prunable weights as layers of TF-MOT do."""

    def get_prunable_weights(self) -> list[Any]:
        return [self.table]


class OwnDense(layers.Dense):
    """A Dense layer whose bias is prunable, and nothing else."""

    def get_prunable_weights(self) -> list[Any]:
        return [self.bias]


@pytest.fixture
def declared() -> Iterator[None]:
    kk.keras.declare_prunable(Mixing, "table", layout=kk.prune.Layout(units=1, inputs=0))
    yield
    kk.keras.declare_prunable(Mixing)


def test_a_layer_names_its_prunable_weights() -> None:
    model = model_of(lambda: Speaking(), SERIES)
    masks = prune_(model, 0.5)
    assert {name.split("/")[-1] for name in masks} == {"table", "kernel"}
    assert "does not declare" in next(w for n, w in masks.left_alone.items() if n.endswith("other"))
    own = keras.Sequential(
        [keras.Input((3,)), OwnDense(4, bias_initializer="ones"), layers.Dense(2)]
    )
    found = prune_(own, 0.5)
    assert {name.split("/")[-1] for name in found} == {"bias", "kernel"} and len(found) == 2


def test_a_layer_that_names_what_is_not_its_own_is_refused() -> None:
    class Wrong(Mixing):
        def get_prunable_weights(self) -> list[Any]:
            return [1.0]

    with pytest.raises(InvalidArgument, match=r"get_prunable_weights.*layer.weights"):
        prune_(model_of(Wrong, SERIES), 0.5)


@pytest.mark.usefixtures("declared")
def test_kernels_of_a_registered_layer_have_axes() -> None:
    model = model_of(Mixing, SERIES)
    table = model.layers[0].table
    table.assign(np.arange(1.0, 17.0).reshape(4, 4))
    name = table.path
    masks = prune_(model, count=1, pattern="units", only=name)
    assert (~masks[name]).all(axis=0).tolist() == [True, False, False, False]
    assert masks[name].sum() == 12
    masks = prune_(model, pattern="2:4", only=name)
    assert (masks[name].sum(axis=0) <= 2).all()


def test_an_axis_that_does_not_lie_alone_is_left_alone() -> None:
    model = model_of(lambda: layers.DepthwiseConv1D(2, depth_multiplier=2), SERIES)
    masks = prune_(model, count=1, pattern=kk.prune.Units(axis=0))
    assert len(masks) == 1 and "dense" in next(iter(masks))
    assert "no axis 0 of its own" in next(
        w for n, w in masks.left_alone.items() if "depthwise" in n and "bias" not in n
    )


def test_what_is_declared_wrongly() -> None:
    with pytest.raises(InvalidArgument, match="not a class of layers"):
        kk.keras.declare_prunable(layers.Dense(2), "kernel")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="go by their names"):
        kk.keras.declare_prunable(Mixing, 3)  # type: ignore[arg-type]


def test_named_variables_counts_slices_and_scores() -> None:
    model = model_of(layers.Flatten, SERIES)
    kernel = model.layers[-1].kernel
    dense = array(kernel)
    found = scores(model)
    assert np.array_equal(found[kernel.path], np.abs(dense))
    assert found.left_alone == {model.layers[-1].bias.path: "a bias"}
    assert len(prune_(model, count=1, only="*/bias")) == 1
    masks = prune_(model, count=3, pattern=kk.prune.Units(axis=0, norm=2))
    gone = set(np.flatnonzero(~masks[kernel.path].any(axis=1)).tolist())
    assert gone == set(np.argsort(np.linalg.norm(dense, axis=1))[:3].tolist())
    worth = {kernel.path: np.arange(40.0).reshape(20, 2)}
    masks = prune_(model, count=5, importance=worth)
    assert (~masks[kernel.path].reshape(-1)).nonzero()[0].tolist() == [0, 1, 2, 3, 4]
    assert str(masks.account).startswith("5 of all 42 weights are zero (11.9%)")
