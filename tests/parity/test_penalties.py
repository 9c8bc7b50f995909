"""Penalties: one number, and one slope, in every framework and in ``fit`` on every backend of Keras."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
keras = pytest.importorskip("keras")
jax = pytest.importorskip("jax")
jnp = jax.numpy

import karikomi as kk  # noqa: E402
from karikomi.errors import InvalidArgument, NonFinite, UnknownName, Unsupported  # noqa: E402
from keras_backends import BACKEND, only, slow_on  # noqa: E402

RULES = [
    kk.prune.L1(0.3),
    kk.prune.L2(0.3),
    kk.prune.GroupLasso(0.3),
    kk.prune.GrowingL2(0.3, growth=0.1),
]
NAMES = ["L1", "L2", "GroupLasso", "GrowingL2"]


def options(rule: Any, weights: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Return what a rule has to be told of one array named ``w``."""
    if isinstance(rule, kk.prune.GroupLasso):
        return {"unit_axes": {"w": 0}}
    if isinstance(rule, kk.prune.GrowingL2):
        kept = np.random.default_rng(seed).random(weights.shape) < 0.5
        return {"masks": {"w": kept}, "step": 7}
    return {}


def small_data() -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(256, 8)).astype(np.float32)
    # Two units are enough for this.
    targets = np.tanh(inputs[:, :1] + inputs[:, 1:2]) - np.tanh(inputs[:, 2:3])
    return inputs, targets.astype(np.float32)


def in_torch(rule: Any, weights: np.ndarray, told: dict[str, Any]) -> tuple[float, np.ndarray]:
    """Return value and gradient of a layer that has these weights."""
    shape = weights.shape
    if weights.ndim == 4:
        layer = torch.nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
    else:
        layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.data = torch.tensor(weights)
    masks = {"weight": torch.tensor(told["masks"]["w"])} if "masks" in told else None
    value = kk.torch.penalty(layer, rule, step=told.get("step", 0), masks=masks)
    value.backward()
    return value.item(), layer.weight.grad.numpy()


def in_jax(rule: Any, weights: np.ndarray, told: dict[str, Any]) -> tuple[float, np.ndarray]:
    @jax.jit
    def both(array: Any, step: Any) -> Any:
        given = told | ({"step": step} if "step" in told else {})
        return jax.value_and_grad(lambda w: kk.jax.penalty({"w": w}, rule, **given))(array)

    value, slope = both(jnp.asarray(weights), jnp.asarray(told.get("step", 0)))
    return float(value), np.asarray(slope)


def keras_layer(weights: np.ndarray) -> tuple[Any, np.ndarray]:
    """Return a built model of one layer that has these weights, units last, and its kernel so."""
    kernel = np.moveaxis(weights, (0, 1), (-1, -2))
    if weights.ndim == 4:
        layer = keras.layers.Conv2D(len(weights), weights.shape[2:], use_bias=False, name="layer")
        shape = (5, 5, weights.shape[1])
    else:
        layer = keras.layers.Dense(len(weights), use_bias=False, name="layer")
        shape = (weights.shape[1],)
    model = keras.Sequential([keras.Input(shape), layer], name="net")
    layer.kernel.assign(kernel)
    return model, kernel


def keras_slope(model: Any, loss: Any) -> tuple[float, np.ndarray]:
    """Return the value and the slope by the first trained variable of ``loss()`` on this backend."""
    variable = model.trainable_variables[0]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss()
        return float(value), tape.gradient(value, variable.value).numpy()
    if BACKEND == "jax":

        def stateless(array: Any) -> Any:
            with keras.StatelessScope(state_mapping=[(variable, array)]):
                return loss()

        value, slope = jax.value_and_grad(stateless)(variable.value)
        return float(value), np.asarray(slope)
    value = loss()
    value.backward()
    return value.item(), variable.value.grad.numpy()


def in_keras(rule: Any, weights: np.ndarray, told: dict[str, Any]) -> tuple[float, np.ndarray]:
    model, kernel = keras_layer(weights)
    masks = None
    if "masks" in told:
        masks = {"net/layer/kernel": np.moveaxis(told["masks"]["w"], (0, 1), (-1, -2))}
    step = keras.ops.convert_to_tensor(told.get("step", 0))
    value, slope = keras_slope(model, lambda: kk.keras.penalty(model, rule, step=step, masks=masks))
    return value, np.moveaxis(slope, (-1, -2), (0, 1)).reshape(weights.shape)


WAYS = {"torch": in_torch, "jax": in_jax, f"keras on {BACKEND}": in_keras}
if BACKEND != "torch":
    WAYS = {f"keras on {BACKEND}": in_keras}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 2, 2)])
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_every_framework_has_the_numbers_of_the_reference(
    rule: Any, shape: tuple[int, ...], way: str
) -> None:
    weights = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    weights[1] = 0.0  # a whole unit, of which the norm has no derivative
    weights[0, 0] = 0.0
    told = options(rule, weights)
    expected, gradients = kk.numpy.penalty({"w": weights}, rule, **told)
    value, slope = WAYS[way](rule, weights, told)
    assert value == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(slope, gradients["w"], rtol=1e-6, atol=1e-7)
    assert np.all(slope[1] == 0.0) and np.all(slope[0, 0] == 0.0)


@only("torch")
@pytest.mark.parametrize("way", ["torch", "jax"])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_norms_far_from_one_neither_overflow_nor_vanish(way: str, scale: float) -> None:
    weights = (np.random.default_rng(5).normal(size=(3, 4)) * scale).astype(np.float32)
    rule, told = kk.prune.GroupLasso(0.3), {"unit_axes": {"w": 0}}
    expected, gradients = kk.numpy.penalty({"w": weights}, rule, **told)
    value, slope = WAYS[way](rule, weights, told)
    assert value == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(slope, gradients["w"], rtol=1e-5)


@only("torch")
def test_long_units_have_exact_slopes() -> None:
    weights = np.random.default_rng(5).normal(size=(1, 1 << 18)).astype(np.float32)
    told = {"unit_axes": {"w": 0}}
    _, gradients = kk.numpy.penalty({"w": weights}, kk.prune.GroupLasso(0.3), **told)
    for way in (in_torch, in_jax):
        _, slope = way(kk.prune.GroupLasso(0.3), weights, told)
        np.testing.assert_allclose(slope, gradients["w"], rtol=1e-5)


@only("torch")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_adds_up_in_single_precision(dtype: str) -> None:
    layer = torch.nn.Linear(300, 300, bias=False, dtype=getattr(torch, dtype))
    layer.weight.data.fill_(2.0)
    value = kk.torch.penalty(layer, kk.prune.L1(1.0))
    assert value.dtype == torch.float32 and value.item() == 180_000  # float16 ends at 65,504
    value.backward()
    assert (
        layer.weight.grad.dtype == layer.weight.dtype and layer.weight.grad.unique().tolist() == [1]
    )
    params = {"w": jnp.full((300, 300), 2.0, dtype)}
    assert float(kk.jax.penalty(params, kk.prune.L1(1.0))) == 180_000


@only("torch")
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_weight_that_is_not_finite_is_not_hidden(rule: Any) -> None:
    weights = np.array([[np.nan, 1.0], [2.0, 3.0]])
    told = options(rule, weights) | {}
    if "masks" in told:
        told["masks"] = {"w": np.zeros((2, 2), bool)}
    with pytest.raises(NonFinite, match="w: a weight is NaN"):
        kk.numpy.penalty({"w": weights}, rule, **told)
    for way in (in_torch, in_jax):
        assert math.isnan(way(rule, weights.astype(np.float32), told)[0])


class Penalised(keras.Model):
    """A functional model whose loss has a term that follows a schedule."""

    rule: Any
    only: str | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps = self.add_weight(shape=(), initializer="zeros", trainable=False, name="steps")

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        term = kk.keras.penalty(self, self.rule, step=self.steps, only=self.only)
        self.steps.assign_add(float(training))
        return loss + term


def fitted(make: Any, **given: Any) -> Any:
    keras.utils.set_random_seed(3)
    inputs, targets = small_data()
    hidden = keras.layers.Dense(6, activation="tanh", name="hidden", **given)
    entry = keras.Input((8,))
    model = make(entry, keras.layers.Dense(1, name="head")(hidden(entry)))
    model.compile(keras.optimizers.SGD(0.05), loss="mse", jit_compile=BACKEND != "torch")
    model.fit(inputs, targets, batch_size=64, epochs=3, shuffle=False, verbose=0)
    return model


def numbers(array: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(array))


def test_the_loss_of_ones_own_model_follows_a_schedule_in_fit() -> None:
    class Scheduled(Penalised):
        rule = kk.prune.L1(kk.schedule.Stepwise(((0, 0.0), (6, 0.5))))

    class AsyncReadback(Penalised):
        rule = kk.prune.L1(kk.schedule.Stepwise(((0, 0.0), (10_000, 0.5))))

    plain, scheduled, late = fitted(keras.Model), fitted(Scheduled), fitted(AsyncReadback)
    scheduled.evaluate(*small_data(), verbose=0)
    assert float(numbers(scheduled.steps)) == 12
    kernel = plain.get_layer("hidden").kernel
    np.testing.assert_allclose(numbers(late.get_layer("hidden").kernel), numbers(kernel), rtol=1e-6)
    pressed = np.abs(numbers(scheduled.get_layer("hidden").kernel)).sum()
    assert pressed < 0.8 * np.abs(numbers(kernel)).sum()


def test_a_regularizer_in_fit_does_what_the_term_in_the_loss_does() -> None:
    class Constant(Penalised):
        rule = kk.prune.GroupLasso(0.2)
        only = "*hidden*"

    regularizer = kk.keras.Penalty(kk.prune.GroupLasso(0.2), unit_axis=-1)
    first, second = fitted(Constant), fitted(keras.Model, kernel_regularizer=regularizer)
    kernels = [numbers(model.get_layer("hidden").kernel) for model in (first, second)]
    np.testing.assert_allclose(*kernels, rtol=1e-5, atol=1e-7)
    free = numbers(fitted(keras.Model).get_layer("hidden").kernel)
    assert np.linalg.norm(kernels[0]) < 0.9 * np.linalg.norm(free)


def test_a_regularizer_survives_a_file(tmp_path: Path) -> None:
    regularizer = kk.keras.Penalty(kk.prune.GroupLasso(0.2), unit_axis=-1)
    model = fitted(keras.Model, kernel_regularizer=regularizer)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.get_layer("hidden").kernel_regularizer.rule == regularizer.rule
    values = [float(numbers(one.losses[0])) for one in (model, again)]
    assert values[0] == values[1] > 0


@slow_on("jax")
def test_who_is_penalised_in_keras() -> None:
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.SeparableConv2D(4, 3, name="separable"),
            layers.LayerNormalization(name="other"),
            layers.Conv2DTranspose(2, 3, name="transposed"),
            layers.Flatten(),
            layers.Dense(2, name="head"),
        ],
        name="net",
    )
    model.get_layer("norm").gamma.assign([1.0, -2.0, 0.5, 0.0])
    assert numbers(kk.keras.penalty(model, kk.prune.ScaleL1(0.1))) == pytest.approx(0.35)
    kernels = [v for v in model.trainable_variables if "kernel" in v.name]
    assert len(kernels) == 5
    total = sum(np.abs(numbers(v)).sum(dtype=np.float64) for v in kernels)
    assert numbers(kk.keras.penalty(model, kk.prune.L1(0.1))) == pytest.approx(
        0.1 * total, rel=1e-5
    )
    model.get_layer("head").trainable = False
    with pytest.raises(Unsupported, match="it is not trained"):
        kk.keras.penalty(model, kk.prune.L1(0.1), only="net/head/kernel")
    with pytest.raises(UnknownName, match="net/head/kernel"):
        kk.keras.penalty(model, kk.prune.L1(0.1), only="net/head/kernl")


def test_mixed_precision_adds_up_in_single_precision() -> None:
    head = keras.layers.Dense(300, use_bias=False, dtype="mixed_float16", kernel_initializer="ones")
    model = keras.Sequential([keras.Input((300,)), head])
    assert numbers(kk.keras.penalty(model, kk.prune.L1(1.0))) == 90_000


@only("torch")
def test_a_regularizer_refuses_what_it_cannot_follow() -> None:
    with pytest.raises(Unsupported, match="has no step and no mask.*compute_loss"):
        kk.keras.Penalty(kk.prune.GrowingL2())
    with pytest.raises(Unsupported, match="has no step and no mask"):
        kk.keras.Penalty(kk.prune.L1(kk.schedule.Linear(0.0, 1.0, steps=(0, 9))))
    with pytest.raises(InvalidArgument, match="unit_axis is needed"):
        kk.keras.Penalty(kk.prune.GroupLasso(1.0))
    with pytest.raises(InvalidArgument, match="of no use"):
        kk.keras.Penalty(kk.prune.L1(1.0), unit_axis=-1)
    with pytest.raises(InvalidArgument, match="not a penalty"):
        kk.keras.Penalty(kk.bound.Clamp(1.0))
