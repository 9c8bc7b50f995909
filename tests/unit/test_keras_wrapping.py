"""What Keras promises of any optimizer holds for one that clips and one that masks, on every backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_backends import only

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras

import karikomi as kk
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.keras.optimizers.masking_optimizer import MaskedOptimizer

SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam


def clipping(inner: Any) -> Any:
    return kk.keras.clipped(inner, kk.clip.AutoClip(50))


def masking(inner: Any) -> Any:
    return MaskedOptimizer(inner, places=[0])


def both(inner: Any) -> Any:
    return masking(clipping(inner))


WRAPPERS = pytest.mark.parametrize("wrapped", [clipping, masking, both])


def weight(*numbers: float) -> Any:
    return keras.Variable(np.array(numbers, "float32"), name="w")


def tensor(*numbers: float) -> Any:
    return keras.ops.convert_to_tensor(np.array(numbers, "float32"))


def numbers(variable: Any) -> Any:
    return keras.ops.convert_to_numpy(variable).tolist()


@WRAPPERS
def test_weights_of_an_optimizer_are_set_those_of_the_inner_one_too(wrapped: Callable) -> None:
    w = weight(1, 2)
    first, second = wrapped(Adam(0.1)), wrapped(Adam(0.5))
    for _ in range(3):
        first.apply_gradients([(tensor(1, 2), w)])
    with pytest.raises(ValueError, match="not yet been built"):
        second.set_weights(first.variables)
    second.build([w])
    second.set_weights([keras.ops.convert_to_numpy(v) for v in first.variables])
    assert [numbers(v) for v in second.variables] == [numbers(v) for v in first.variables]
    # Adam's moments: m = (1 - 0.9 ** 3) g, after three equal gradients.
    inner = second.inner_optimizer
    moments = getattr(inner, "inner_optimizer", inner).variables[2:]
    np.testing.assert_allclose(numbers(moments[0]), [0.271, 0.542], rtol=1e-6)
    before = numbers(w)
    first.apply_gradients([(tensor(1, 2), w)])
    after = numbers(w)
    w.assign(before)
    second.apply_gradients([(tensor(1, 2), w)])
    assert numbers(w) == after


@WRAPPERS
def test_weights_of_another_kind_of_optimizer_are_refused(wrapped: Callable) -> None:
    w = weight(1, 2)
    bare, outer = Adam(0.1), wrapped(Adam(0.1))
    bare.build([w])
    outer.build([w])
    with pytest.raises(InvalidArgument, match=r"not the variables.*got 4 of them.*inner_optimizer"):
        outer.set_weights(bare.variables)


@WRAPPERS
@pytest.mark.parametrize(
    "given",
    [
        np.array([2.0, 4.0], "float32"),
        np.array([2.0, 4.0], "float64"),
        np.array([2, 4], "int32"),
        [2.0, 4.0],
    ],
    ids=["float32", "float64", "int32", "list"],
)
def test_gradients_may_be_arrays_of_numpy(wrapped: Callable, given: Any) -> None:
    w = weight(1, 2)
    wrapped(SGD(0.25)).apply_gradients([(given, w)])
    assert numbers(w) == [0.5, 1.0]


@WRAPPERS
def test_arrays_of_numpy_are_accumulated_and_take_part_in_a_scale(wrapped: Callable) -> None:
    w, outer = (
        weight(1, 2),
        wrapped(SGD(0.25, gradient_accumulation_steps=2, loss_scale_factor=2.0)),
    )
    assert float(outer.scale_loss(1.0)) == 2.0
    for grad in ([4.0, 8.0], [0.0, 0.0]):
        outer.apply_gradients([(np.array(grad, "float32"), w)])
    assert numbers(w) == [0.75, 1.5]


@only("jax")
def test_sparse_arrays_of_jax_are_made_dense() -> None:
    from jax.experimental import sparse

    w = weight(1, 2)
    outer = clipping(SGD(1.0))
    outer.apply([sparse.BCOO.fromdense(np.array([0.0, 3.0], "float32"))], [w])
    assert (numbers(w), outer.last.pre) == ([1.0, -1.0], 3.0)


@WRAPPERS
def test_an_optimizer_is_built_once(wrapped: Callable) -> None:
    w, outer = weight(1, 2), wrapped(Adam(0.1))
    outer.build([w])
    names = [v.path for v in outer.variables]
    outer.build([w])
    assert [v.path for v in outer.variables] == names
    assert len(set(names)) == len(names)


@WRAPPERS
def test_steps_without_variables_need_a_built_optimizer_and_a_gradient_each(
    wrapped: Callable,
) -> None:
    outer = wrapped(SGD(1.0))
    with pytest.raises(InvalidArgument, match=r"does not know the variables yet.*optimizer\.build"):
        outer.apply([tensor(1)])
    outer.build([weight(1)])
    with pytest.raises(InvalidArgument, match="got 2 gradients, 1 variables"):
        outer.apply([tensor(1), tensor(1)])
    outer.apply([tensor(1)])
    assert int(outer.iterations) == 1


def network() -> Any:
    first = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", name="first")
    second = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", name="second")
    return keras.Sequential([keras.Input((1,)), first, second])


def several(**arguments: Any) -> Any:
    choices = keras.optimizers.OptimizerMap(SGD(0.5, **arguments), {".*first/.*": SGD(0.25)})
    return keras.optimizers.MultiOptimizer(choices)


def test_optimizers_for_groups_of_variables_are_clipped_together_and_come_back(
    tmp_path: Path,
) -> None:
    model = network()
    model.compile(kk.keras.clipped(several(), kk.clip.ByGlobalNorm(1.0)), "mse")
    x = np.ones((2, 1), "float32")
    halve = keras.callbacks.LearningRateScheduler(lambda _, rate: rate / 2)
    model.fit(x, np.zeros((2, 1)), verbose=0, callbacks=[halve])
    # Both gradients are 2, their norm is 2.83; both rates are halved.
    steps = 1 - np.array(model.get_weights()).ravel()
    np.testing.assert_allclose(steps, [0.125 / 2**0.5, 0.25 / 2**0.5], rtol=1e-5)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras").optimizer
    assert [float(part.learning_rate) for part in again.inner_optimizer.optimizers] == [0.125, 0.25]


def test_optimizers_for_groups_that_clip_or_accumulate_themselves_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"its clipnorm is set.*leave clipnorm out of SGD"):
        clipping(several(clipnorm=1.0))
    with pytest.raises(Unsupported, match="clips or accumulates gradients itself; got SGD"):
        clipping(several(gradient_accumulation_steps=2))
    by_choice = keras.optimizers.MultiOptimizer(lambda _: SGD(1.0, clipnorm=1.0))
    with pytest.raises(Unsupported, match="its clipnorm is set"):
        clipping(by_choice).build([weight(1)])


def test_averages_are_swapped_where_clip_and_masks_are_around_the_optimizer() -> None:
    model = network()
    model.compile(both(SGD(0.25, use_ema=True, ema_momentum=0.5)), "mse")
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    x = np.ones((2, 1), "float32")
    model.fit(x, np.zeros((2, 1)), verbose=0, epochs=2, callbacks=[swap], validation_data=(x, x))
    # 1, then 0.5 (its own average), then 0.5 - 0.25 * 2 * 0.125 = 0.4375, which is averaged with 0.5.
    np.testing.assert_allclose(model.get_weights()[0], [[0.46875]], rtol=1e-6)


def test_the_loss_scale_of_masked_optimizers_is_that_inside() -> None:
    w, inner = weight(2, 2), masking(SGD(0.1, loss_scale_factor=2.0))
    chosen = keras.optimizers.OptimizerMap(inner)
    outer = keras.optimizers.MultiOptimizer(chosen, loss_scale_factor=5.0)
    outer.build([w])
    outer.apply([tensor(10, 10)], [w])
    np.testing.assert_allclose(numbers(w), [1.8, 1.8], rtol=1e-6)


@only("tensorflow")
def test_a_checkpoint_of_tensorflow_holds_the_masks(tmp_path: Path) -> None:
    import tensorflow as tf

    w, first, second = weight(1, 2), masking(Adam(0.1)), masking(Adam(0.1))
    first.build([w])
    first.hold({0: np.array([True, False])})
    first.apply_gradients([(tensor(1, 1), w)])
    path = tf.train.Checkpoint(optimizer=first).save(str(tmp_path / "c"))
    second.build([w])
    tf.train.Checkpoint(optimizer=second).restore(path)
    assert second.masks()[0].tolist() == [True, False]
    assert [numbers(v) for v in second.variables] == [numbers(v) for v in first.variables]
