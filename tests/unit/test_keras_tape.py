"""Clipping in hand-written loops: `tf.GradientTape` eager, compiled and under XLA, and the arrays of other backends."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import keras

    if find_spec("tensorflow"):
        import tensorflow as tf

import karikomi as kk
from karikomi.errors import InvalidArgument, NonFinite, Unsupported

pytestmark = pytest.mark.skipif(not find_spec("tensorflow"), reason="no tensorflow")

SHAPES = {"table": (20, 4), "kernel": (4, 3), "bias": (3,)}
UNIT_AXES = {"kernel": -1, "table": 0}
RULES = {
    "ByGlobalNorm": kk.clip.ByGlobalNorm(1.0),
    "ByNorm": kk.clip.ByNorm(0.5),
    "ByValue": kk.clip.ByValue(0.1),
    "AGC": kk.clip.AGC(0.01),
    "AutoClip": kk.clip.AutoClip(10),
    "ZClip": kk.clip.ZClip(),
    "AdaGC": kk.clip.AdaGC(1.05),
    "Chain": kk.clip.Chain(kk.clip.ByValue(0.5), kk.clip.ByNorm(0.5)),
}
MODES = {"eager": None, "graph": False, "xla": True}


def variables() -> list[Any]:
    random = np.random.default_rng(0)
    return [
        tf.Variable(random.normal(size=shape).astype("float32"), name=name)
        for name, shape in SHAPES.items()
    ]


def gradients(step: int) -> list[Any]:
    random = np.random.default_rng(step)
    rows, kernel, bias = (random.normal(size=s).astype("float32") for s in ((5, 4), (4, 3), (3,)))
    if step == 2:
        bias[0] = np.nan
    places = tf.constant([3, 1, 3, 7, 1])
    scaled = tf.constant(kernel * np.float32(10.0 ** (step % 3)))
    return [
        tf.IndexedSlices(tf.constant(rows), places, tf.constant([20, 4])),
        scaled,
        tf.constant(bias),
    ]


def dense(grads: list[Any]) -> dict[str, np.ndarray]:
    return {n: tf.convert_to_tensor(g).numpy() for n, g in zip(SHAPES, grads, strict=True)}


def compiled(step: Callable, mode: str) -> Any:
    return step if mode == "eager" else tf.function(step, jit_compile=MODES[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RULES)
def test_the_numbers_are_those_of_the_reference(name: str, mode: str) -> None:
    rule, known = RULES[name], variables()
    weights = {n: v.numpy() for n, v in zip(SHAPES, known, strict=True)} if name == "AGC" else None

    def step(grads: Any, state: Any) -> Any:
        return kk.keras.clip(grads, rule, state, variables=known, unit_axes=UNIT_AXES)[::2]

    step = compiled(step, mode)
    state = kk.keras.initial_state(rule, known, unit_axes=UNIT_AXES)
    expected_state = None
    for number in range(4):
        grads, state = step(gradients(number), state)
        expected, outcome, expected_state = kk.numpy.clip(
            dense(gradients(number)), rule, expected_state, unit_axes=UNIT_AXES, weights=weights
        )
        assert isinstance(grads[0], tf.IndexedSlices)
        for key, array in dense(grads).items():
            np.testing.assert_allclose(array, expected[key], rtol=1e-6, atol=1e-7)
        told = kk.keras.outcome(state)
        assert (told.action, told.nonfinite) == (outcome.action, outcome.nonfinite)
        # The reference does not measure what comes after a stage that skips.
        if not (told.skipped and name == "Chain"):
            assert told.tensors() == pytest.approx(outcome.tensors(), rel=1e-6, nan_ok=True)
    if mode != "eager":
        assert step.experimental_get_tracing_count() == 1


def test_containers_names_and_what_is_absent_stay() -> None:
    grads = {"a": [tf.constant([3.0, 4.0]), None], "b": (tf.constant(1.0),)}
    clipped, outcome, _ = kk.keras.clip(grads, kk.clip.ByNorm(1.0))
    assert clipped["a"][1] is None and isinstance(clipped["b"], tuple)
    np.testing.assert_allclose(clipped["a"][0], [0.6, 0.8], rtol=1e-6)
    assert outcome.names == ("a.0", "a.1", "b.0")
    unnamed = [tf.Variable(0.0, name="same"), tf.Variable([0.0, 0.0], name="same")]
    _, outcome, _ = kk.keras.clip(
        list(map(tf.ones_like, unnamed)), kk.clip.ByNorm(1.0), variables=unnamed
    )
    assert outcome.names == ("same", "same#2")


def test_a_trained_tape_loop_is_the_clipped_optimizer() -> None:
    inputs = tf.constant(np.random.default_rng(0).normal(size=(32, 4)).astype("float32"))
    rule = kk.clip.AutoClip(30)

    def trained(step_of: Callable) -> tuple[np.ndarray, Any]:
        weight = tf.Variable(np.full((4, 1), 0.5, "float32"), name="w")
        state = kk.keras.initial_state(rule, [weight])
        for start in range(0, 32, 4):
            state = step_of(weight, inputs[start : start + 4], state)
        return weight.numpy(), state

    def grads_of(weight: Any, batch: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((batch @ weight - 1.0) ** 2)
        return tape.gradient(loss, [weight])

    def by_hand(weight: Any, batch: Any, state: Any) -> Any:
        (grad,), _, state = kk.keras.clip(grads_of(weight, batch), rule, state, variables=[weight])
        weight.assign_sub(0.1 * grad)
        return state

    results = [trained(by_hand), trained(tf.function(by_hand))]
    optimizer = kk.keras.clipped(keras.optimizers.SGD(0.1), rule)
    variable = keras.Variable(np.full((4, 1), 0.5, "float32"), name="w")

    def by_optimizer(weight: Any, batch: Any, state: Any) -> Any:
        weight.assign(variable.numpy())
        (grad,) = grads_of(weight, batch)
        optimizer.apply([keras.ops.convert_to_tensor(grad.numpy())], [variable])
        weight.assign(variable.numpy())
        return state

    results.append(trained(by_optimizer))
    for weight, _ in results[1:]:
        np.testing.assert_allclose(weight, results[0][0], rtol=0, atol=1e-6)
    assert kk.keras.outcome(results[1][1]).pre == pytest.approx(optimizer.last.pre, rel=1e-5)


def test_a_state_goes_through_files_and_continues(tmp_path: Path) -> None:
    rule, known = kk.clip.Chain(kk.clip.AdaGC(1.05), kk.clip.AutoClip(10)), variables()

    def after(state: Any, steps: range) -> Any:
        for number in steps:
            grads, _, state = kk.keras.clip(gradients(number), rule, state, variables=known)
        return [g.numpy().tolist() for g in map(tf.convert_to_tensor, grads)]

    state = kk.keras.initial_state(rule, known)
    for number in range(2):
        _, _, state = kk.keras.clip(gradients(number), rule, state, variables=known)
    plain = {key: value.numpy().tolist() for key, value in state.items()}
    np.savez(tmp_path / "state.npz", **{key: value.numpy() for key, value in state.items()})
    held = {key: tf.Variable(value) for key, value in state.items()}
    saved = tf.train.Checkpoint(**{key.replace(".", "_"): v for key, v in held.items()})
    path = saved.save(str(tmp_path / "checkpoint"))
    for variable in held.values():
        variable.assign(tf.zeros_like(variable))
    saved.restore(path).assert_consumed()
    expected = after(state, range(3, 5))
    for again in (json.loads(json.dumps(plain)), dict(np.load(tmp_path / "state.npz")), held):
        assert after(again, range(3, 5)) == expected


def test_what_is_not_known_yet_is_said() -> None:
    @tf.function
    def step(grad: Any) -> Any:
        grads, outcome, state = kk.keras.clip([grad], kk.clip.ByNorm(1.0), nonfinite="raise")
        with pytest.raises(InvalidArgument, match="inside of a function that is being compiled"):
            _ = outcome.pre
        return grads, state

    (grad,), state = step(tf.constant([np.nan, 1.0]))
    assert grad.numpy().tolist() == [0.0, 0.0]
    assert bool(state["skipped"])
    with pytest.raises(NonFinite, match="1 steps in a row .* the last in 0"):
        kk.keras.check(state, stop_after=1)
    kk.keras.check(state)
    with pytest.raises(InvalidArgument, match="keras.check: stop_after must be >= 1; got 0"):
        kk.keras.check(state, stop_after=0)
    with pytest.raises(NonFinite, match="keras.clip: non-finite entries in 0"):
        kk.keras.clip([tf.constant([np.nan])], kk.clip.ByNorm(1.0), nonfinite="raise")


def test_sizes_that_only_variables_tell() -> None:
    known = [tf.Variable(np.zeros((4, 2), "float32"), name="table")]

    @tf.function(input_signature=[tf.TensorSpec([None, 2]), tf.TensorSpec([None], tf.int32)])
    def step(rows: Any, places: Any) -> Any:
        sparse = tf.IndexedSlices(rows, places, None)
        with pytest.raises(InvalidArgument, match="shape of this gradient is not known; pass var"):
            kk.keras.clip([sparse], kk.clip.ByNorm(1.0))
        return kk.keras.clip([sparse], kk.clip.ByNorm(1.0), variables=known)[::2]

    (grad,), state = step(tf.ones((3, 2)), tf.constant([1, 1, 0]))
    assert kk.keras.outcome(state).pre == pytest.approx(10.0**0.5)
    np.testing.assert_allclose(np.linalg.norm(tf.convert_to_tensor(grad)), 1.0, rtol=1e-6)


def test_clamped_rows_are_the_clamped_sums() -> None:
    sparse = tf.IndexedSlices(tf.constant([[3.0], [1.0], [2.0]]), tf.constant([1, 0, 1]), (2, 1))
    (grad,), _, _ = kk.keras.clip([sparse], kk.clip.ByValue(4.0))
    assert tf.convert_to_tensor(grad).numpy().tolist() == [[1.0], [4.0]]


HARD = {
    "huge": np.array([1e30, -1e30], "float32"),
    "tiny": np.array([1e-25, 1e-25], "float32"),
    "huge half": np.full(100_000, 6e4, "float16"),
    "zero": np.zeros(3, "float32"),
    "wide": np.array([1e200, 1e200]),
    "constant": np.full(3_000_001, 0.1, "float32"),
    "empty": np.zeros((0, 3), "float32"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HARD)
def test_norms_survive_overflow_underflow_and_length(name: str, mode: str) -> None:
    array = HARD[name]
    exact = float(np.linalg.norm(array.astype(np.float128)))
    rules = kk.clip.ByNorm(1e-3), kk.clip.ByValue(1e-3)
    for rule in rules:
        step = compiled(lambda grad, rule=rule: kk.keras.clip([grad], rule)[::2], mode)
        (grad,), state = step(tf.constant(array))
        told = kk.keras.outcome(state)
        expected = exact if rule is rules[0] else float(np.abs(array).max(initial=0.0))
        assert told.pre == pytest.approx(expected, rel=2e-6)
        assert told.post <= 1e-3 * (1 + 1e-3)
        assert np.isfinite(grad.numpy()).all()
    if exact > 1.0:
        assert float(np.abs(grad.numpy()).max()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_factors_too_small_for_their_dtype_still_scale(mode: str) -> None:
    grad = tf.constant([3e38, -1e38])
    (clipped,), _ = compiled(lambda grad: kk.keras.clip([grad], kk.clip.ByNorm(1e-3))[::2], mode)(
        grad
    )
    np.testing.assert_allclose(clipped, np.array([3.0, -1.0]) * 1e-3 / 10**0.5, rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_one_nan_is_found_among_many(mode: str) -> None:
    array = np.linspace(1.0, 2.0, 1000, dtype="float32")
    array[500] = np.nan
    step = compiled(lambda grad: kk.keras.clip([grad], kk.clip.ByValue(1.0))[2], mode)
    assert kk.keras.outcome(step(tf.constant(array))).nonfinite == ("0",)


def test_the_arrays_of_the_other_backends_are_served_whatever_keras_runs_on() -> None:
    torch = pytest.importorskip("torch")
    (grad,), outcome, state = kk.keras.clip([torch.tensor([3.0, 4.0])], kk.clip.ByNorm(1.0))
    assert (grad.tolist(), outcome.pre) == (pytest.approx([0.6, 0.8]), 5.0)
    jnp = pytest.importorskip("jax.numpy")
    (grad,), outcome, _ = kk.keras.clip([jnp.array([3.0, 4.0])], kk.clip.ByNorm(1.0), state)
    assert (grad.tolist(), outcome.pre) == (pytest.approx([0.6, 0.8]), 5.0)


def test_what_cannot_be_done_is_refused() -> None:
    grads = [tf.constant([1.0])]
    with pytest.raises(Unsupported, match="pass variables=model.trainable_variables"):
        kk.keras.clip(grads, kk.clip.AGC(0.1))
    with pytest.raises(Unsupported, match="acts on updates"):
        kk.keras.clip(grads, kk.clip.BlockRMS())
    with pytest.raises(InvalidArgument, match="got ndarray; kk.numpy.clip is for NumPy's"):
        kk.keras.clip([np.ones(3)], kk.clip.ByNorm(1.0))
    with pytest.raises(InvalidArgument, match="not a floating array"):
        kk.keras.clip([tf.constant([1])], kk.clip.ByNorm(1.0))
    with pytest.raises(InvalidArgument, match="1 gradients, 3 variables"):
        kk.keras.clip(grads, kk.clip.ByNorm(1.0), variables=variables())
    with pytest.raises(InvalidArgument, match="no gradient to clip"):
        kk.keras.clip([None], kk.clip.ByNorm(1.0))
    _, _, state = kk.keras.clip(grads, kk.clip.AdaGC(1.05))
    with pytest.raises(InvalidArgument, match="state is of other arrays or of another rule"):
        kk.keras.clip([*grads, *grads], kk.clip.AdaGC(1.05), state)
    with pytest.raises(Unsupported, match="complex entries have no order"):
        kk.keras.clip([tf.constant([1j])], kk.clip.ByValue(1.0))
    (grad,), _, _ = kk.keras.clip([tf.constant([3.0 + 4.0j])], kk.clip.ByNorm(1.0))
    np.testing.assert_allclose(grad, [0.6 + 0.8j], rtol=1e-6)
