"""An optimizer that clips: what Keras does where it does the same, and what it promises beyond, on every backend."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_backends import BACKEND, only, sampled, slow_on

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras

import karikomi as kk
from karikomi.errors import InvalidArgument, NonFinite, UnknownName, Unsupported

INF = float("inf")
# Without it JAX compiles every operation by itself, which takes longer.
JIT = BACKEND == "jax"
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(64, 8)).astype("float32")
Y = (5.0 * RANDOM.normal(size=(64, 1))).astype("float32")
SGD, Adam = keras.optimizers.SGD, keras.optimizers.Adam


def network(names: tuple[str, str] = ("one", "two"), **kwargs: Any) -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(6, activation="tanh", name=names[0], **kwargs),
        keras.layers.Dense(1, name=names[1], **kwargs),
    ]
    return keras.Sequential([keras.Input((8,)), *layers])


def fitted(optimizer: Any, model: Any = None, epochs: int = 5, jit: bool = JIT) -> keras.Model:
    model = model or network()
    if optimizer is not None:
        model.compile(optimizer, loss="mse", jit_compile=jit)
    model.fit(X, Y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)
    return model


def flat(model: keras.Model) -> np.ndarray:
    return np.concatenate([weights.ravel() for weights in model.get_weights()])


def tensor(values: Any) -> Any:
    return keras.ops.convert_to_tensor(np.asarray(values, "float32"))


def values(variables: list[Any]) -> list[list[float]]:
    return [keras.ops.convert_to_numpy(v).tolist() for v in variables]


def weight(*numbers: float, name: str = "w") -> Any:
    return keras.Variable(np.array(numbers, "float32"), name=name)


PEERS = {
    "global_clipnorm": (kk.clip.ByGlobalNorm(1.0), {"global_clipnorm": 1.0}),
    "clipnorm": (kk.clip.ByNorm(0.5), {"clipnorm": 0.5}),
    "clipvalue": (kk.clip.ByValue(0.1), {"clipvalue": 0.1}),
}


@pytest.mark.parametrize("name", sampled(PEERS, "peers"))
def test_is_what_keras_does_where_it_does_the_same(name: str) -> None:
    rule, arguments = PEERS[name]
    ours = fitted(kk.keras.clipped(SGD(0.05, momentum=0.9, weight_decay=0.01), rule))
    theirs = fitted(SGD(0.05, momentum=0.9, weight_decay=0.01, **arguments))
    assert ours.optimizer.last.engaged
    np.testing.assert_allclose(flat(ours), flat(theirs), rtol=0, atol=1e-6)


@only("tensorflow")
def test_compiled_by_xla_it_is_the_same() -> None:
    rule, arguments = PEERS["global_clipnorm"]
    ours = fitted(kk.keras.clipped(Adam(0.01), rule), jit=True)
    np.testing.assert_allclose(
        flat(ours), flat(fitted(Adam(0.01, **arguments), jit=True)), rtol=0, atol=1e-6
    )


@slow_on("jax")
def test_a_limit_of_infinity_is_the_optimizer_alone_accumulation_included() -> None:
    def inner() -> Any:
        rate = keras.optimizers.schedules.ExponentialDecay(0.01, 3, 0.7)
        return Adam(rate, gradient_accumulation_steps=3)

    ours = fitted(kk.keras.clipped(inner(), kk.clip.ByGlobalNorm(INF)), jit=False)
    theirs = fitted(inner(), jit=False)
    assert flat(ours).tolist() == flat(theirs).tolist()
    assert int(ours.optimizer.iterations) == int(theirs.optimizer.iterations) == 6
    assert ours.optimizer.last.action == "kept"


def test_what_is_clipped_is_the_average_of_an_update() -> None:
    one, two = weight(0.0, 0.0), weight(0.0, name="v")
    optimizer = kk.keras.clipped(SGD(1.0, gradient_accumulation_steps=2), kk.clip.ByGlobalNorm(1.0))
    for grads in ([tensor([30.0, 8.0]), tensor([0.0])], [tensor([-24.0, 0.0]), tensor([0.0])]):
        assert values([one]) == [[0.0, 0.0]]
        optimizer.apply(grads, [one, two])
    assert optimizer.last.pre == 5.0
    np.testing.assert_allclose(values([one])[0], [-0.6, -0.8], rtol=1e-6)
    assert values(optimizer._accumulated_gradients) == [[0.0, 0.0], [0.0]]


def test_a_skipped_step_leaves_everything_as_it_is() -> None:
    variables = [weight(1.0, 2.0), weight(3.0, name="v")]
    inner = Adam(0.1, use_ema=True, ema_overwrite_frequency=2, weight_decay=0.1)
    optimizer = kk.keras.clipped(inner, kk.clip.AutoClip(10))
    optimizer.apply([tensor([1.0, 1.0]), tensor([2.0])], variables)
    before = values([*variables, *inner.variables])
    optimizer.apply([tensor([1.0, np.nan]), tensor([2.0])], variables)
    assert values([*variables, *inner.variables]) == before
    assert int(optimizer.iterations) == 1
    assert (optimizer.last.action, optimizer.last.nonfinite) == ("skipped", ("w",))
    optimizer.apply([tensor([1.0, 1.0]), tensor([2.0])], variables)
    assert values(variables) != before[:2]
    assert int(optimizer.iterations) == 2


def test_rules_that_skip_are_served_whatever_the_policy() -> None:
    variable = weight(0.0)
    rule = kk.clip.SkipSpikes(2.0, window=4, warmup=4)
    optimizer = kk.keras.clipped(SGD(1.0), rule, nonfinite="pass")
    for gradient in (1.0, 1.1, 0.9, 1.0, 1.0, 1.0, 1e6):
        optimizer.apply([tensor([gradient])], [variable])
    assert optimizer.last.action == "skipped"
    assert values([variable])[0][0] == pytest.approx(-6.0, abs=1e-5)


def test_zeroed_tensors_leave_the_others_their_step() -> None:
    variables = [weight(0.0), weight(0.0, name="v")]
    optimizer = kk.keras.clipped(SGD(1.0), kk.clip.ByNorm(1.0), nonfinite="zero")
    optimizer.apply([tensor([np.inf]), tensor([2.0])], variables)
    assert values(variables) == [[0.0], [-1.0]]
    assert optimizer.last.action == "zeroed"


def test_the_loss_scale_of_the_optimizer_is_taken_out_once() -> None:
    variable = weight(0.0, 0.0)
    optimizer = kk.keras.clipped(SGD(1.0, loss_scale_factor=1024.0), kk.clip.ByGlobalNorm(10.0))
    assert float(optimizer.scale_loss(2.0)) == 2048.0
    optimizer.apply([tensor([3072.0, 4096.0])], [variable])
    assert optimizer.last.pre == 5.0
    assert values([variable]) == [[-3.0, -4.0]]


def test_mixed_precision_wraps_it_and_the_clip_sees_true_sizes() -> None:
    rule = kk.clip.ByGlobalNorm(1.0)
    plain = fitted(kk.keras.clipped(SGD(0.01), rule), epochs=1)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        mixed = network()
        mixed.compile(kk.keras.clipped(SGD(0.01), rule), loss="mse")
        assert isinstance(mixed.optimizer, keras.optimizers.LossScaleOptimizer)
        own = kk.keras.clipped(SGD(0.01), rule)
        fitted(keras.optimizers.LossScaleOptimizer(own, initial_scale=256.0), mixed, epochs=1)
    finally:
        keras.config.set_dtype_policy("float32")
    assert own.last.pre == pytest.approx(plain.optimizer.last.pre, rel=0.02)
    assert int(own.iterations) == 4


@only("jax")
def test_stateless_apply_is_apply() -> None:
    import jax

    start = np.array([1.0, 2.0], "float32")
    one, two = weight(*start), weight(*start)
    optimizers = [kk.keras.clipped(Adam(0.1), kk.clip.ZClip()) for _ in range(2)]
    for optimizer, variable in zip(optimizers, (one, two), strict=True):
        optimizer.build([variable])
    step = jax.jit(optimizers[0].stateless_apply)
    state, weights = [v.value for v in optimizers[0].variables], [one.value]
    for gradient in ([1.0, 2.0], [np.nan, 1.0], [1e6, 1.0], [2.0, -1.0]):
        weights, state = step(state, [tensor(gradient)], weights)
        optimizers[1].apply([tensor(gradient)], [two])
    np.testing.assert_allclose(weights[0], values([two])[0], rtol=1e-6)
    for mine, own in zip(state, optimizers[1].variables, strict=True):
        np.testing.assert_allclose(mine, own.numpy(), rtol=1e-6)
    assert values([one]) == [start.tolist()]


ADAPTIVE: dict[str, Callable[[], Any]] = {
    "by tensor, unit and all": lambda: kk.keras.clipped(
        Adam(0.01),
        kk.clip.Chain(kk.clip.AGC(0.05), kk.clip.AdaGC(1.02), kk.clip.ZClip()),
        unit_axes=network(),
        bound=kk.bound.MaxNorm(0.8),
    ),
    "a history, between micro-batches": lambda: kk.keras.clipped(
        Adam(0.01, gradient_accumulation_steps=3), kk.clip.AutoClip(30)
    ),
    "its own moments": lambda: kk.keras.clipped(SGD(0.01), kk.clip.SPAM()),
}


@slow_on("tensorflow")
@pytest.mark.parametrize("name", sampled(ADAPTIVE, "resumed"))
def test_to_save_load_and_continue_is_not_to_stop(name: str, tmp_path: Path) -> None:
    whole = fitted(ADAPTIVE[name](), epochs=2)
    fitted(None, whole, epochs=1)
    half = fitted(ADAPTIVE[name](), epochs=2)
    half.save(tmp_path / "half.keras")
    loaded = keras.saving.load_model(tmp_path / "half.keras")
    # Their names may have changed: Keras loads a model under other paths than it had.
    assert loaded.optimizer.last.norms.tolist() == half.optimizer.last.norms.tolist()
    fitted(None, loaded, epochs=1)
    assert flat(loaded).tolist() == flat(whole).tolist()
    assert values(loaded.optimizer.variables) == values(whole.optimizer.variables)
    assert loaded.optimizer.last.norms.tolist() == whole.optimizer.last.norms.tolist()


class Store(dict):
    """What Keras gives to an optimizer to save into."""


def _stepped(names: list[str], sizes: list[int]) -> tuple[Any, list[Any]]:
    variables = [weight(*[1.0] * n, name=name) for name, n in zip(names, sizes, strict=True)]
    optimizer = kk.keras.clipped(SGD(0.1), kk.clip.AdaGC(1.05))
    optimizer.build(variables)
    return optimizer, variables


def _limits(optimizer: Any) -> dict[str, float]:
    state = optimizer._own.state()
    key = next(key for key in state if key.startswith("rule.") and "gamma" in key)
    numbers = keras.ops.convert_to_numpy(state[key]).tolist()
    return dict(zip(optimizer._own.names, numbers, strict=True))


def test_learned_entries_go_with_names_and_else_with_places() -> None:
    first, variables = _stepped(["a", "b"], [2, 3])
    for _ in range(3):
        first.apply([tensor([1.0, 0.0]), tensor([5.0, 0.0, 0.0])], variables)
    store = Store()
    first.save_own_variables(store)
    turned, _ = _stepped(["b", "a"], [3, 2])
    turned.load_own_variables(store)
    assert _limits(turned) == _limits(first)
    assert turned.last.tensors() == first.last.tensors()
    renamed, _ = _stepped(["c", "d"], [2, 3])
    renamed.load_own_variables(store)
    assert list(_limits(renamed).values()) == list(_limits(first).values())
    fewer, _ = _stepped(["a"], [2])
    with pytest.raises(InvalidArgument, match="other variables; got 2 of them"):
        fewer.load_own_variables(store)


def test_the_configuration_comes_back_as_it_was_given() -> None:
    decay = keras.optimizers.schedules.ExponentialDecay(0.01, 3, 0.7)
    inner = Adam(decay, gradient_accumulation_steps=4, loss_scale_factor=8.0)
    optimizer = kk.keras.clipped(
        inner,
        kk.clip.Chain(kk.clip.ByValue(1.0), kk.clip.ZClip()),
        bound=kk.bound.Clamp(2.0),
        nonfinite="zero",
        stop_after=3,
        unit_axes={"*kernel": [-1]},
    )
    told = keras.saving.serialize_keras_object(optimizer)
    again = keras.saving.deserialize_keras_object(copy.deepcopy(told))
    assert (
        keras.saving.serialize_keras_object(again)["config"].items()
        >= {key: value for key, value in told["config"].items() if key != "inner_optimizer"}.items()
    )
    assert (again.rule, again.bound) == (optimizer.rule, optimizer.bound)
    config = told["config"]["inner_optimizer"]["config"]
    assert again.get_config()["inner_optimizer"]["config"] == config
    assert (config["gradient_accumulation_steps"], config["loss_scale_factor"]) == (4, 8.0)
    assert config["learning_rate"]["class_name"] == "ExponentialDecay"


def test_the_learning_rate_is_that_of_the_optimizer_inside() -> None:
    optimizer = kk.keras.clipped(SGD(0.5), kk.clip.ByNorm(1.0))
    optimizer.learning_rate = 0.25
    assert float(optimizer.inner_optimizer.learning_rate) == float(optimizer.learning_rate) == 0.25


def test_ten_bad_steps_in_a_row_stop_the_training_and_name_the_culprit() -> None:
    variables = [weight(0.0), weight(0.0, name="v")]
    optimizer = kk.keras.clipped(SGD(1.0), kk.clip.ByNorm(1.0), stop_after=2)
    bad = [tensor([1.0]), tensor([np.nan])]
    optimizer.apply(bad, variables)
    with pytest.raises(NonFinite, match="2 steps in a row .* the last in v"):
        optimizer.apply(bad, variables)
    with pytest.raises(NonFinite, match="2 steps in a row"):
        optimizer.check()


def test_fit_ends_with_the_check() -> None:
    model = network()
    optimizer = kk.keras.clipped(SGD(0.1), kk.clip.ByNorm(1.0), stop_after=3)
    model.compile(optimizer, loss="mse")
    with pytest.raises(NonFinite, match="in a row with non-finite entries, the last in .*kernel"):
        model.fit(np.full_like(X, np.nan), Y, batch_size=16, verbose=0)


def test_raise_raises_where_values_are_known() -> None:
    variable = weight(0.0)
    optimizer = kk.keras.clipped(SGD(1.0), kk.clip.ByNorm(1.0), nonfinite="raise")
    with pytest.raises(NonFinite, match="keras.clipped: non-finite entries in w"):
        optimizer.apply([tensor([np.inf])], [variable])
    assert values([variable]) == [[0.0]]


def test_a_bound_holds_after_every_step() -> None:
    model = network()
    bound = kk.bound.MaxNorm(0.5)
    optimizer = kk.keras.clipped(SGD(0.1), kk.clip.ByNorm(1.0), bound=bound, unit_axes=model)
    fitted(optimizer, model, epochs=1)
    norms = np.linalg.norm(model.layers[0].kernel.numpy(), axis=0)
    assert norms.max() <= 0.5 * (1 + 1e-6)
    kernels = [layer.kernel.path for layer in model.layers]
    assert list(dict.fromkeys(optimizer.last_bound.names)) == kernels
    assert list(optimizer.last_bound.left_alone) == [layer.bias.path for layer in model.layers]


def test_agc_compares_with_the_weights() -> None:
    variable = weight(3.0, 4.0)
    optimizer = kk.keras.clipped(SGD(1.0), kk.clip.AGC(0.1))
    optimizer.apply([tensor([0.0, 10.0])], [variable])
    np.testing.assert_allclose(values([variable])[0], [3.0, 3.5], rtol=1e-6)


def test_scales_that_are_overwritten_are_not_clipped() -> None:
    variables = [weight(1.0), weight(1.0, name="scale")]
    variables[1].overwrite_with_gradient = True
    inner = SGD(1.0, gradient_accumulation_steps=2, loss_scale_factor=2.0)
    optimizer = kk.keras.clipped(inner, kk.clip.ByGlobalNorm(1.0))
    optimizer.apply([tensor([8.0]), tensor([70.0])], variables)
    optimizer.apply([tensor([8.0]), tensor([50.0])], variables)
    assert values(variables) == [[0.0], [70.0]]
    assert optimizer.last.names == ("w",)


def test_absent_gradients_take_no_part() -> None:
    variables = [weight(1.0), weight(1.0, name="v")]
    optimizer = kk.keras.clipped(SGD(1.0), kk.clip.ByNorm(0.5))
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        optimizer.apply([None, tensor([2.0])], variables)
    assert values(variables) == [[1.0], [0.5]]
    optimizer.apply([tensor([2.0])], variables[:1])
    assert values(variables) == [[0.5], [0.5]]


def test_what_would_do_something_else_is_refused() -> None:
    rule = kk.clip.ByNorm(1.0)
    for argument in ("clipnorm", "global_clipnorm", "clipvalue"):
        with pytest.raises(Unsupported, match=f"would clip as well, its {argument} is set"):
            kk.keras.clipped(Adam(0.1, **{argument: 1.0}), rule)
    with pytest.raises(Unsupported, match=r"LossScaleOptimizer\(kk.keras.clipped\(inner, rule\)\)"):
        kk.keras.clipped(keras.optimizers.LossScaleOptimizer(Adam(0.1)), rule)
    with pytest.raises(Unsupported, match="clipped already; put rules together"):
        kk.keras.clipped(kk.keras.clipped(Adam(0.1), rule), rule)
    with pytest.raises(Unsupported, match="acts on updates"):
        kk.keras.clipped(Adam(0.1), kk.clip.BlockRMS())
    with pytest.raises(InvalidArgument, match="not an optimizer of Keras"):
        kk.keras.clipped(3, rule)
    with pytest.raises(Unsupported, match="MaxNorm acts on a weight"):
        kk.keras.clipped(Adam(0.1), kk.bound.MaxNorm(1.0))


def test_an_optimizer_may_be_named() -> None:
    assert isinstance(kk.keras.clipped("adam", kk.clip.ByNorm(1.0)).inner_optimizer, Adam)


@functools.cache
def mirrored_strategy() -> Any:
    """One for all tests: the collectives of a second one would bear the same numbers."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@only("tensorflow")
@pytest.mark.parametrize("kind", sampled(["plain", "accumulated", "scaled"], "mirrored"))
def test_mirrored_replicas_are_one_device_on_the_joint_batch(kind: str) -> None:
    def optimizer() -> Any:
        steps = 2 if kind == "accumulated" else None
        inner = SGD(0.05, momentum=0.9, gradient_accumulation_steps=steps)
        rule = kk.clip.Chain(kk.clip.AdaGC(1.02), kk.clip.ByGlobalNorm(1.0))
        own = kk.keras.clipped(inner, rule, bound=kk.bound.Clamp(0.4))
        return keras.optimizers.LossScaleOptimizer(own) if kind == "scaled" else own

    strategy = mirrored_strategy()
    with strategy.scope():
        mirrored = network()
        made = optimizer()
        mirrored.compile(made, loss="mse")
    poisoned = X.copy()
    poisoned[17] = np.nan
    single = network()
    single.compile(optimizer(), loss="mse", jit_compile=False)
    for model in (mirrored, single):
        model.fit(poisoned, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    np.testing.assert_allclose(flat(mirrored), flat(single), rtol=0, atol=1e-6)
    owns = [
        m.optimizer.inner_optimizer if kind == "scaled" else m.optimizer for m in (mirrored, single)
    ]
    assert owns[0].last.pre == pytest.approx(owns[1].last.pre, rel=1e-5)
    steps = [int(keras.ops.convert_to_numpy(own.iterations)) for own in owns]
    assert steps == [2, 2] if kind == "accumulated" else [6, 6]


@only("tensorflow")
def test_sparse_gradients_stay_sparse_and_are_the_dense_ones() -> None:
    import tensorflow as tf

    slices = tf.IndexedSlices(tensor([[3.0], [1.0], [-1.0]]), tf.constant([2, 0, 2]), (4, 1))
    tables = [keras.Variable(np.ones((4, 1), "float32"), name="table") for _ in range(2)]
    optimizers = [kk.keras.clipped(SGD(1.0), kk.clip.ByGlobalNorm(1.0)) for _ in range(2)]
    step = tf.function(lambda: optimizers[0].apply([slices], tables[:1]))
    optimizers[0].build(tables[:1])
    step()
    optimizers[1].apply([tf.convert_to_tensor(slices)], tables[1:])
    assert optimizers[0].last.pre == optimizers[1].last.pre == pytest.approx(5**0.5)
    np.testing.assert_allclose(tables[0].numpy(), tables[1].numpy(), rtol=1e-6)


@only("tensorflow")
def test_a_checkpoint_of_tensorflow_holds_all_of_it(tmp_path: Path) -> None:
    import tensorflow as tf

    def made() -> tuple[Any, Any]:
        variable = weight(1.0, 2.0)
        optimizer = kk.keras.clipped(Adam(0.1), kk.clip.AutoClip(10))
        optimizer.build([variable])
        return optimizer, variable

    one, variable = made()
    for gradient in ([1.0, 2.0], [3.0, 4.0]):
        one.apply([tensor(gradient)], [variable])
    path = tf.train.Checkpoint(optimizer=one).save(str(tmp_path / "one"))
    two, _ = made()
    tf.train.Checkpoint(optimizer=two).restore(path).assert_existing_objects_matched()
    assert values(two.variables) == values(one.variables)


def test_what_an_optimizer_was_relieved_of_is_not_lost_by_wrapping_it_again() -> None:
    inner = SGD(0.1, gradient_accumulation_steps=4)
    optimizer = kk.keras.clipped(inner, kk.clip.ByNorm(1.0))
    with pytest.raises(Unsupported, match="another clipped optimizer has taken over .* a new SGD"):
        kk.keras.clipped(inner, kk.clip.ByNorm(1.0))
    assert optimizer.gradient_accumulation_steps == 4
    with pytest.raises(InvalidArgument, match="not an optimizer of Keras; got None"):
        kk.keras.clipped(None, kk.clip.ByNorm(1.0))


def test_what_was_said_by_full_paths_is_still_true_in_a_loaded_model(tmp_path: Path) -> None:
    model = network()
    paths = [variable.path for variable in model.trainable_variables]
    start = paths[0].split("/")[0]
    rule = kk.clip.Groups({f"{start}/one/*": kk.clip.AdaGC(1.05), "*": kk.clip.ByNorm(1.0)})
    axes = {path: -1 for path in paths if path.endswith("kernel")}
    bound = kk.bound.MaxNorm(0.8)
    fitted(kk.keras.clipped(SGD(0.1), rule, unit_axes=axes, bound=bound), model, epochs=1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    fitted(None, loaded, epochs=1)
    assert flat(loaded).tolist() == flat(fitted(None, model, epochs=1)).tolist()
    assert list(loaded.optimizer.last.tensors()) == paths
    # Of variables of other shapes nothing was said.
    again = type(model.optimizer).from_config(model.optimizer.get_config())
    other = [weight(1.0, name=path) for path in ("a", "b", "c", "d")]
    with pytest.raises(UnknownName):
        again.build(other)


def test_weights_arrive_where_the_optimizer_cannot_read_its_own(tmp_path: Path) -> None:
    whole = fitted(kk.keras.clipped(Adam(0.1), kk.clip.AutoClip(10)), epochs=1)
    plain = fitted(Adam(0.1), epochs=1)
    whole.save_weights(tmp_path / "clipped.weights.h5")
    plain.save_weights(tmp_path / "plain.weights.h5")
    fresh = network()
    fresh.compile(kk.keras.clipped(Adam(0.1), kk.clip.AutoClip(10)), loss="mse")
    with pytest.warns(UserWarning, match="[Ss]kipping variable loading") as told:
        fresh.load_weights(tmp_path / "clipped.weights.h5")
    assert any("it has not been built yet" in str(one.message) for one in told)
    assert flat(fresh).tolist() == flat(whole).tolist()
    with pytest.warns(UserWarning, match="[Ss]kipping variable loading") as told:
        whole.load_weights(tmp_path / "plain.weights.h5")
    assert any("the file holds no clip" in str(one.message) for one in told)
    assert flat(whole).tolist() == flat(plain).tolist()
    other, _ = _stepped(["a", "b"], [2, 3])
    store = Store()
    whole.optimizer.save_own_variables(store)
    with pytest.raises(InvalidArgument, match="this file is of another rule"):
        other.load_own_variables(store)


def test_a_model_that_is_frozen_as_a_whole_is_left_alone() -> None:
    model = network()
    rule = kk.clip.Groups({"*kernel": kk.clip.AutoClip(10), "*": kk.clip.ByNorm(1.0)})
    bound = kk.bound.MaxNorm(1.0)
    optimizer = kk.keras.clipped(SGD(0.1), rule, unit_axes=model, bound=bound)
    model.trainable = False
    before = flat(model).tolist()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The model does not have any trainable weights")
        fitted(optimizer, model, epochs=1)
    assert flat(model).tolist() == before
    assert (optimizer.last, optimizer.last_bound) == (None, None)


def test_a_legacy_file_holds_each_variable_once(tmp_path: Path) -> None:
    model = network()
    loss = keras.losses.MeanSquaredError()
    model.compile(kk.keras.clipped(Adam(0.1), kk.clip.AutoClip(10)), loss=loss)
    fitted(None, model, epochs=1)
    paths = [variable.path for variable in model.optimizer.variables]
    assert len(set(paths)) == len(paths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(tmp_path / "m.h5")
        loaded = keras.saving.load_model(tmp_path / "m.h5")
    # Of no optimizer does Keras load the state from such a file.
    assert flat(loaded).tolist() == flat(model).tolist()


@only("jax")
def test_an_error_of_the_first_step_is_the_one_that_is_told() -> None:
    model = fitted(kk.keras.clipped(Adam(0.1), kk.clip.AutoClip(10)), epochs=1)
    other = keras.Sequential([keras.Input((8,)), *[keras.layers.Dense(n) for n in (3, 1)]])
    with pytest.raises(ValueError, match="shape"):
        fitted(model.optimizer, other, epochs=1)


@only("tensorflow")
def test_sums_of_replicas_that_wait_are_saved_as_they_add_up() -> None:
    import tensorflow as tf

    strategy = mirrored_strategy()

    def made() -> tuple[Any, Any]:
        with strategy.scope():
            variable = weight(0.0)
            inner = SGD(1.0, gradient_accumulation_steps=2)
            optimizer = kk.keras.clipped(inner, kk.clip.ByGlobalNorm(100.0))
            optimizer.build([variable])
        return optimizer, variable

    def step(optimizer: Any, variable: Any) -> None:
        def of_replica() -> None:
            place = tf.distribute.get_replica_context().replica_id_in_sync_group
            optimizer.apply([tensor([1.0]) + 2.0 * tf.cast(place, "float32")], [variable])

        tf.function(lambda: strategy.run(of_replica))()

    whole, first = made()
    half, second = made()
    step(whole, first)
    store = Store()
    whole.save_own_variables(store)
    half.load_own_variables(store)
    step(whole, first)
    step(half, second)
    assert values([first]) == values([second]) == [[-4.0]]


@only("torch")
def test_a_bound_reports_what_it_measured_before_and_after() -> None:
    kernel = weight(3.0, 4.0)
    bound = kk.bound.MaxNorm(kk.schedule.Linear(2.0, 1.0, steps=(0, 2)), per="tensor")
    optimizer = kk.keras.clipped(SGD(0.0), kk.clip.ByNorm(1.0), bound=bound)
    seen = []
    for _ in range(3):
        optimizer.apply([tensor([1.0, 1.0])], [kernel])
        seen.append((optimizer.last_bound.pre, optimizer.last_bound.post))
    assert seen == [pytest.approx(pair) for pair in [(5.0, 2.0), (2.0, 1.5), (1.5, 1.0)]]


@only("torch")
def test_a_bound_goes_with_names_when_it_is_loaded() -> None:
    def made(names: list[str], numbers: list[list[float]]) -> tuple[Any, list[Any]]:
        variables = [weight(*own, name=name) for name, own in zip(names, numbers, strict=True)]
        bound = kk.bound.MaxNorm(1.0, per="tensor")
        optimizer = kk.keras.clipped(SGD(0.0), kk.clip.ByNorm(1.0), bound=bound)
        optimizer.build(variables)
        return optimizer, variables

    first, variables = made(["a", "b"], [[3.0, 4.0], [0.0, 0.5, 0.0]])
    first.apply([tensor([1.0, 1.0]), tensor([1.0, 1.0, 1.0])], variables)
    store = Store()
    first.save_own_variables(store)
    turned, _ = made(["b", "a"], [[0.0] * 3, [0.0] * 2])
    turned.load_own_variables(store)
    assert turned.last_bound.tensors() == {"a": 5.0, "b": 0.5}


@only("torch")
def test_a_skipped_update_leaves_no_accumulated_gradients() -> None:
    variable = weight(0.0, 0.0)
    inner = SGD(1.0, gradient_accumulation_steps=2)
    optimizer = kk.keras.clipped(inner, kk.clip.ByGlobalNorm(INF))
    for gradient in ([8.0, 2.0], [np.nan, 2.0], [1.0, 2.0], [3.0, 6.0]):
        optimizer.apply([tensor(gradient)], [variable])
        seen = values([variable]) + values(optimizer._accumulated_gradients)
    assert seen == [[-2.0, -4.0], [0.0, 0.0]]


@only("torch")
def test_an_error_ends_the_window_of_micro_batches() -> None:
    variable = weight(0.0)
    inner = SGD(1.0, gradient_accumulation_steps=2)
    optimizer = kk.keras.clipped(inner, kk.clip.ByNorm(INF), nonfinite="raise")
    for gradient in (1.0, np.nan, 2.0, 6.0):
        if np.isnan(gradient):
            with pytest.raises(NonFinite, match="entries in w"):
                optimizer.apply([tensor([gradient])], [variable])
        else:
            optimizer.apply([tensor([gradient])], [variable])
            assert values([variable]) == [[-4.0 if gradient == 6.0 else 0.0]]


@only("torch")
def test_the_policy_to_zero_stops_a_run_of_bad_steps_too() -> None:
    variables = [weight(0.0), weight(0.0, name="v")]
    optimizer = kk.keras.clipped(SGD(1.0), kk.clip.ByNorm(1.0), nonfinite="zero", stop_after=2)
    bad = [tensor([1.0]), tensor([np.nan])]
    optimizer.apply(bad, variables)
    with pytest.raises(NonFinite, match="2 steps in a row .* the last in v"):
        optimizer.apply(bad, variables)


@only("torch")
def test_second_moments_of_half_precision_weights_are_wide() -> None:
    half = keras.Variable(np.zeros(1, "float16"), dtype="float16", name="half")
    optimizer = kk.keras.clipped(SGD(0.0), kk.clip.SPAM())
    optimizer.apply([keras.ops.convert_to_tensor(np.array([0.01], "float16"))], [half])
    square = float(np.float16(0.01)) ** 2
    moment = optimizer._own.entries["moment.half"]
    assert moment.dtype == "float32"
    assert float(moment.numpy()[0]) == pytest.approx(0.001 * square, rel=1e-4)


@only("torch")
def test_the_outcomes_of_a_chain_keep_a_stage_each() -> None:
    rule = kk.clip.Chain(kk.clip.ByValue(4.0), kk.clip.ByNorm(2.0), kk.clip.ByValue(1.5))
    optimizer = kk.keras.clipped(SGD(1.0), rule)
    optimizer.apply([tensor([6.0, 0.0])], [weight(0.0, 0.0)])
    last = optimizer.last
    assert [stage.norms.tolist() for stage in (*last.earlier, last)] == [[6.0], [4.0], [2.0]]


@only("torch")
def test_final_averages_are_those_of_the_optimizer_alone() -> None:
    found = []
    for wrap in (lambda inner: inner, lambda inner: kk.keras.clipped(inner, kk.clip.ByNorm(INF))):
        variable = weight(1.0, 5.0)
        optimizer = wrap(SGD(1.0, use_ema=True, ema_momentum=0.5))
        for gradient in ([1.0, 1.0], [-4.0, 2.0]):
            optimizer.apply([tensor(gradient)], [variable])
        last = values([variable])
        optimizer.finalize_variable_values([variable])
        found.append(values([variable]))
        assert found[-1] != last
    assert found[0] == found[1]


@only("torch")
def test_equal_names_are_numbered_from_two() -> None:
    variables = [weight(0.0), weight(0.0), weight(0.0)]
    optimizer = kk.keras.clipped(SGD(1.0), kk.clip.ByNorm(INF))
    optimizer.apply([tensor([1.0]), tensor([2.0]), tensor([3.0])], variables)
    assert optimizer.last.tensors() == {"w": 1.0, "w#2": 2.0, "w#3": 3.0}


def test_the_backend_is_the_one_that_was_asked_for() -> None:
    assert keras.config.backend() == BACKEND


def _normalised(**how: Any) -> tuple[Any, dict[str, Any]]:
    variables = {n: weight(1.0, name=n) for n in ("kernel", "gamma", "beta")}
    bound = kk.bound.Clamp(0.25)
    optimizer = kk.keras.clipped(SGD(0.0), kk.clip.ByNorm(1.0), bound=bound, **how)
    optimizer.build(list(variables.values()))
    return optimizer, variables


def _bounded(optimizer: Any, variables: dict[str, Any]) -> list[str]:
    for variable in variables.values():
        variable.assign([1.0])
    optimizer.apply([tensor([0.0]) for _ in variables], list(variables.values()))
    return [name for name, variable in variables.items() if float(variable.numpy()[0]) == 0.25]


@only("torch")
def test_a_bound_spares_gains_unless_they_are_selected() -> None:
    optimizer, variables = _normalised()
    assert _bounded(optimizer, variables) == ["kernel", "beta"]
    assert "only='*'" in optimizer.last_bound.left_alone["gamma"]
    assert _bounded(*_normalised(only="*")) == ["kernel", "gamma", "beta"]
    optimizer, variables = _normalised(only=["kernel", "gamma"], exclude={"kernel"})
    assert _bounded(optimizer, variables) == ["gamma"]
    assert optimizer.last_bound.left_alone == dict.fromkeys(["kernel", "beta"], "not selected")
    config = json.loads(json.dumps(optimizer.get_config()))
    again = type(optimizer).from_config(config)
    again.build(list(variables.values()))
    assert _bounded(again, variables) == ["gamma"]
    with pytest.raises(InvalidArgument, match="only and exclude select what a bound affects"):
        kk.keras.clipped(SGD(0.0), kk.clip.ByNorm(1.0), only="*")


@only("torch")
def test_a_saved_bound_keeps_bounding_what_it_bounded() -> None:
    now, variables = _normalised()
    config = {k: v for k, v in now.get_config().items() if k not in ("only", "exclude")}
    earlier = type(now).from_config(config)
    earlier.build(list(variables.values()))
    assert _bounded(earlier, variables) == ["kernel", "gamma", "beta"]
    store = Store()
    earlier.save_own_variables(store)
    for places in (store.pop("bounded"), None):
        with pytest.raises(InvalidArgument, match="of a bound on other variables.*only='\\*'"):
            now.load_own_variables(store if places is None else {**store, "bounded": places})
        every, _ = _normalised(only="*")
        every.load_own_variables(store)
        assert every.last_bound.tensors() == {"kernel": 1.0, "gamma": 1.0, "beta": 1.0}
