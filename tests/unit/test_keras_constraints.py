"""Bounds as constraints of Keras: the same numbers as the reference, in fit, in files, on a built model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
layers = keras.layers

import karikomi as kk  # noqa: E402
from karikomi.errors import InvalidArgument, NonFinite, UnknownName, Unsupported  # noqa: E402
from karikomi.keras import Bound, bound_  # noqa: E402
from keras_backends import BACKEND, only, sampled  # noqa: E402

JIT = BACKEND != "torch"
RULES = {
    "Clamp": (kk.bound.Clamp(0.5), {}),
    "MaxNorm": (kk.bound.MaxNorm(0.9), {"unit_axis": -1}),
    "MaxNorm of the tensor": (kk.bound.MaxNorm(0.9, per="tensor"), {}),
    "UnitNorm": (kk.bound.UnitNorm(0.7), {"unit_axis": -1}),
    "UnitNorm of rows": (kk.bound.UnitNorm(0.7), {"unit_axis": 0}),
    "NonNegative": (kk.bound.NonNegative(), {}),
    "InitScaled": (kk.bound.InitScaled(1.5), {"fan_in": 12}),
    "measuring only": (kk.bound.Clamp(float("inf")), {}),
}
# Without a setting of its own JAX has no float64.
DTYPES = ["float16", "bfloat16", "float32", *(["float64"] if BACKEND != "jax" else [])]


def numbers(variable: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(variable))


def weights(shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(3).normal(size=shape)


def reference(array: np.ndarray, rule: Any, options: dict[str, Any]) -> np.ndarray:
    given = {"unit_axes": "unit_axis", "fan_in": "fan_in"}
    said = {name: {"w": options[key]} for name, key in given.items() if key in options}
    return kk.numpy.bound({"w": array}, rule, **said)[0]["w"]


def network(*inner: Any, shape: tuple[int, ...] = (4,)) -> Any:
    return keras.Sequential([keras.Input(shape), *inner], name="net")


def trained(model: Any, *, steps: int = 3, rate: float = 0.5) -> Any:
    if not model.compiled:
        model.compile(keras.optimizers.SGD(rate), loss="mse", jit_compile=JIT)
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(8 * steps, *model.input_shape[1:])).astype("float32")
    targets = 5 * rng.normal(size=(8 * steps, *model.output_shape[1:])).astype("float32")
    model.fit(inputs, targets, batch_size=8, verbose=0)
    return model


def reloaded(model: Any, folder: Path) -> Any:
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, dtype) for case in RULES for dtype in sampled(DTYPES, case)]
)
def test_a_constraint_does_what_the_reference_does(case: str, dtype: str) -> None:
    rule, options = RULES[case]
    given = keras.ops.convert_to_tensor(weights((3, 4, 5)), dtype=dtype)
    found = Bound(rule, **options)(given)
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    exact = numbers(given).astype("float32" if dtype == "bfloat16" else dtype)
    expected = reference(exact, rule, options)
    # Half precisions are rounded once, at the end.
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3}.get(dtype, 1e-6)
    np.testing.assert_allclose(numbers(found).astype(exact.dtype), expected, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_within_its_bound_keeps_every_bit(dtype: str) -> None:
    array = weights((4, 5))
    array[0, 0] = -0.0
    given = keras.ops.convert_to_tensor(array, dtype=dtype)
    for rule, options in (
        (kk.bound.Clamp(9.0), {}),
        (kk.bound.MaxNorm(9.0), {"unit_axis": -1}),
        (kk.bound.InitScaled(99.0), {"fan_in": 9}),
    ):
        assert numbers(Bound(rule, **options)(given)).tobytes() == numbers(given).tobytes()


def test_several_axes_name_one_unit_and_odd_entries_are_left() -> None:
    array = weights((3, 3, 2, 2)).astype("float32")
    array[0, 0, 1, 1] = np.nan
    found = numbers(Bound(kk.bound.MaxNorm(1.0), unit_axis=(-2, -1))(array))
    norms = np.sqrt(np.square(found).sum(axis=(0, 1)))
    np.testing.assert_allclose(norms[0], 1.0, rtol=1e-6)
    assert np.array_equal(found[..., 1, 1], array[..., 1, 1], equal_nan=True)


@only("torch")
def test_keras_own_max_norm_drifts_below_its_limit_and_ours_stands() -> None:
    ours, theirs = (
        Bound(kk.bound.MaxNorm(1.0), unit_axis=-1),
        keras.constraints.MaxNorm(1.0, axis=0),
    )
    first = mine = ours(weights((4, 3), 9.0).astype("float32"))
    other = theirs(first)
    for _ in range(300):
        mine, other = ours(mine), theirs(other)
    assert numbers(mine).tobytes() == numbers(first).tobytes()
    drifted = np.linalg.norm(numbers(other), axis=0)
    assert np.all(drifted < 1.0 - 1e-5) and np.all(drifted > 0.99)


def test_fit_keeps_a_constraint_given_to_a_layer() -> None:
    free = layers.Dense(3, name="free")
    held = layers.Dense(
        5,
        kernel_constraint=Bound(kk.bound.MaxNorm(0.25), unit_axis=-1),
        bias_constraint=Bound(kk.bound.Clamp(0.01)),
    )
    trained(network(held, free))
    assert np.linalg.norm(numbers(held.kernel), axis=0).max() <= 0.25 * (1 + 1e-6)
    assert np.abs(numbers(held.bias)).max() == np.float32(0.01)
    assert np.linalg.norm(numbers(free.kernel), axis=0).max() > 0.25


@only("torch")
def test_a_config_is_plain_and_comes_back() -> None:
    for rule, options in RULES.values():
        bound = Bound(rule, **options)
        again = keras.constraints.deserialize(keras.constraints.serialize(bound))
        assert again.get_config() == bound.get_config() and again.rule == rule
    both = Bound(kk.bound.MaxNorm(1.0), unit_axis=(-2, -1))
    assert Bound.from_config(both.get_config()).unit_axis == (-2, -1)
    with pytest.raises(UnknownName, match="MaxNrm"):
        Bound.from_config({"rule": {"rule": "MaxNrm", "limit": 1.0}})


@only("torch")
@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (kk.bound.MaxNorm(kk.schedule.Linear(2.0, 1.0, steps=(0, 9))), {}, "has no step"),
        (kk.bound.SpectralCap(1.0), {}, "sees one weight .* needs spectral_norm"),
        (kk.bound.QKClip(), {}, "sees one weight .* needs largest_logit"),
        (kk.clip.ByNorm(1.0), {}, "acts on a gradient"),
        (kk.bound.MaxNorm, {}, "not a rule"),
        (2.0, {}, "not a rule"),
        (kk.bound.MaxNorm(1.0), {}, "needs unit_axis"),
        (kk.bound.InitScaled(1.0), {}, "needs fan_in"),
        (kk.bound.InitScaled(1.0), {"fan_in": 0}, "a number of inputs"),
        (kk.bound.Clamp(1.0), {"unit_axis": -1}, "unit_axis is of no use"),
        (kk.bound.Clamp(1.0), {"fan_in": 3}, "fan_in is of no use"),
        (kk.bound.MaxNorm(1.0), {"unit_axis": 0.5}, "a whole number"),
        (kk.bound.MaxNorm(1.0), {"unit_axis": ()}, "a whole number"),
    ],
)
def test_what_a_constraint_cannot_follow_is_refused(rule: Any, options: Any, message: str) -> None:
    with pytest.raises((Unsupported, InvalidArgument), match=message):
        Bound(rule, **options)


@only("torch")
def test_axes_that_a_weight_does_not_have_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="no such axis"):
        Bound(kk.bound.MaxNorm(1.0), unit_axis=2)(np.ones((2, 2), "float32"))


# Attached to a built model.


def test_a_built_model_is_bounded_at_once_and_in_fit() -> None:
    model = network(layers.Dense(6, name="dense_a"), layers.Dense(3, name="head"))
    kernel, before = model.layers[0].kernel, numbers(model.layers[0].kernel)
    rule = kk.bound.MaxNorm(0.3)
    outcome = bound_(model, rule, only="dense*")
    expected, told, _ = kk.numpy.bound({"w": before}, rule, unit_axes={"w": -1})
    np.testing.assert_allclose(numbers(kernel), expected["w"], rtol=1e-6)
    assert set(outcome.names) == {"net/dense_a/kernel"} and outcome.action == "clipped"
    others = dict.fromkeys(["net/head/kernel", "net/head/bias"], "not selected")
    assert outcome.left_alone == {"net/dense_a/bias": "a bias", **others}
    assert outcome.pre == pytest.approx(told.pre) and outcome.post == pytest.approx(told.post)
    assert outcome.share_at_bound == told.share_at_bound
    trained(model)
    assert np.linalg.norm(numbers(kernel), axis=0).max() <= 0.3 * (1 + 1e-6)
    assert model.layers[1].kernel.constraint is None
    assert bound_(model, rule, only="dense*").action == "kept"  # again, which changes nothing


@only("torch")
@pytest.mark.parametrize(
    "rule", [kk.bound.Clamp(0.1), kk.bound.NonNegative(), kk.bound.InitScaled(0.3)]
)
def test_every_rule_reports_as_the_reference_does(rule: Any) -> None:
    model = network(layers.Dense(6, name="a", bias_initializer="ones"))
    kernel, bias = model.layers[0].kernel, model.layers[0].bias
    arrays = {"kernel": numbers(kernel), "bias": numbers(bias)}
    fans = {"fan_in": {"*": 4}} if isinstance(rule, kk.bound.InitScaled) else {}
    expected, told, _ = kk.numpy.bound(arrays, rule, **fans)
    outcome = bound_(model, rule)
    np.testing.assert_allclose(numbers(kernel), expected["kernel"], rtol=1e-6)
    np.testing.assert_allclose(numbers(bias), expected["bias"], rtol=1e-6)
    assert outcome.share_at_bound == pytest.approx(told.share_at_bound)
    assert outcome.left_alone == {}


def test_a_model_that_was_trained_already_is_bounded_from_then_on() -> None:
    """On TensorFlow and JAX a compiled step does not look at constraints that came after it."""
    model = trained(network(layers.Dense(3, name="a")))
    assert model.train_function is not None
    bound_(model, kk.bound.Clamp(0.05))
    assert model.train_function is None
    assert np.abs(numbers(trained(model).layers[0].kernel)).max() <= np.float32(0.05)


SAVED = {
    "Dense": (lambda: layers.Dense(3), (4,)),
    "Conv2D": (lambda: layers.Conv2D(3, 2), (4, 4, 2)),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(3, 2), (4, 2)),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(2), (4, 4, 2)),
    "SeparableConv1D": (lambda: layers.SeparableConv1D(3, 2), (4, 2)),
    "EinsumDense": (lambda: layers.EinsumDense("ab,bc->ac", 3, bias_axes="c"), (4,)),
    "Embedding": (lambda: layers.Embedding(9, 3), (4,)),
    "GRU": (lambda: layers.GRU(2), (4, 2)),
    "RNN of a cell": (lambda: layers.RNN(layers.SimpleRNNCell(2)), (4, 2)),
    "ConvLSTM1D": (lambda: layers.ConvLSTM1D(2, 2), (3, 4, 2)),
    "Bidirectional": (lambda: layers.Bidirectional(layers.LSTM(2)), (4, 2)),
    "TimeDistributed": (lambda: layers.TimeDistributed(layers.Dense(2)), (4, 2)),
    "a model inside": (lambda: network(layers.Dense(2), layers.BatchNormalization()), (4,)),
}


@only("torch")
@pytest.mark.parametrize("case", SAVED)
def test_what_is_attached_is_in_the_file(case: str, tmp_path: Path) -> None:
    """Every constraint comes back, which it would not from the variables alone."""
    make, shape = SAVED[case]
    model = keras.Sequential([keras.Input(shape), make()])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "karikomi")
        bound_(model, kk.bound.Clamp(0.125), only="*")
    held = [variable.constraint.get_config() for variable in model.trainable_variables]
    again = reloaded(model, tmp_path)
    assert [v.constraint.get_config() for v in again.trainable_variables] == held


def test_a_loaded_model_is_kept_within_its_bound_when_training_goes_on(tmp_path: Path) -> None:
    model = network(
        layers.Conv1D(3, 2, name="conv"), layers.Flatten(), layers.Dense(1), shape=(6, 2)
    )
    bound_(model, kk.bound.UnitNorm(0.5), only=["conv", "dense*"])
    again = trained(reloaded(trained(model), tmp_path))
    norms = np.sqrt(np.square(numbers(again.get_layer("conv").kernel)).sum(axis=(0, 1)))
    np.testing.assert_allclose(norms, 0.5, rtol=1e-6)


class Subclassed(keras.Model):
    """A model whose layers come from code."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inner = layers.Dense(2, name="inner")

    def build(self, shape: Any) -> None:
        self.inner.build(shape)
        self.built = True

    def call(self, inputs: Any) -> Any:
        return self.inner(inputs)


@only("torch")
def test_what_a_file_will_not_have_is_said() -> None:
    model = Subclassed()
    model.build((None, 4))
    with pytest.warns(UserWarning, match=r"inner/kernel.* kk\.keras\.clipped\(optimizer"):
        bound_(model, kk.bound.MaxNorm(0.1))
    assert model.inner.kernel.constraint is not None


@only("torch")
def test_projections_of_attention_are_bounded_but_not_saved(tmp_path: Path) -> None:
    inputs = keras.Input((4, 2))
    attention = layers.MultiHeadAttention(2, 3, name="attention")
    model = keras.Model(inputs, layers.Dense(1, name="head")(attention(inputs, inputs)))
    with pytest.warns(UserWarning, match="karikomi") as caught:
        outcome = bound_(model, kk.bound.MaxNorm(0.1))
    (said,) = [text for one in caught if (text := str(one.message)).startswith("karikomi")]
    assert "query/kernel" in said and "and 1 more" in said
    assert "head/kernel" not in said and "head/kernel" in outcome.names
    again = reloaded(model, tmp_path)
    bounded = [v.path for v in again.trainable_variables if v.constraint is not None]
    assert bounded == ["head/kernel"]


@only("torch")
def test_a_pattern_that_matches_nothing_names_the_nearest() -> None:
    model = network(layers.Dense(3, name="encoder"), layers.Dense(3, name="head"))
    with pytest.raises(UnknownName, match="did you mean 'encoder'"):
        bound_(model, kk.bound.Clamp(1.0), only="encodr")
    outcome = bound_(model, kk.bound.Clamp(1.0), only="*kernel", exclude="head")
    assert outcome.names == ("net/encoder/kernel",)
    with pytest.raises(Unsupported, match="leaves no weight"):
        bound_(model, kk.bound.Clamp(1.0), only="head", exclude="*")


@only("torch")
def test_another_constraint_is_not_taken_away() -> None:
    model = network(layers.Dense(3), layers.Dense(3, name="b", kernel_constraint="non_neg"))
    with pytest.raises(
        Unsupported, match="net/b/kernel: the weight has another constraint.*NonNeg"
    ):
        bound_(model, kk.bound.Clamp(0.01))
    assert model.layers[0].kernel.constraint is None
    assert np.abs(numbers(model.layers[0].kernel)).max() > 0.01
    bound_(model, kk.bound.Clamp(0.01), exclude="b")
    with pytest.raises(Unsupported, match="another constraint already; got Bound"):
        bound_(model, kk.bound.Clamp(0.02), exclude="b")


@only("torch")
def test_a_constraint_that_only_the_layer_has_is_not_taken_away() -> None:
    model = network(layers.Dense(3, name="a"))
    model.layers[0].kernel_constraint = keras.constraints.NonNeg()
    assert model.layers[0].kernel.constraint is None
    with pytest.raises(Unsupported, match="net/a/kernel: the weight has another constraint"):
        bound_(model, kk.bound.Clamp(0.01))
    assert isinstance(model.layers[0].kernel_constraint, keras.constraints.NonNeg)


@only("torch")
def test_frozen_weights_and_those_without_a_unit_are_left_alone() -> None:
    model = network(
        layers.Dense(3, name="frozen"), layers.BatchNormalization(name="norm"), layers.Dense(3)
    )
    model.get_layer("frozen").trainable = False
    outcome = bound_(model, kk.bound.MaxNorm(0.1))
    assert outcome.left_alone["net/frozen/kernel"] == "not trained"
    assert outcome.left_alone["net/norm/moving_mean"] == "not trained"
    assert outcome.left_alone["net/norm/gamma"] == "BatchNormalization declares no unit axis"
    assert len(set(outcome.names)) == 1
    with pytest.raises(Unsupported, match="no selected weight.*a bias"):
        bound_(model, kk.bound.MaxNorm(0.1), only="*bias")


@only("torch")
def test_weights_that_are_not_finite_or_not_there_are_refused() -> None:
    model = network(layers.Dense(3, name="a"))
    model.layers[0].bias.assign([0.0, np.nan, 0.0])
    with pytest.raises(NonFinite, match="net/a/bias"):
        bound_(model, kk.bound.Clamp(0.01))
    assert model.layers[0].kernel.constraint is None
    with pytest.raises(InvalidArgument, match="no variables yet"):
        bound_(keras.Sequential([layers.Dense(3)]), kk.bound.Clamp(1.0))
    with pytest.raises(Unsupported, match="has no step"):
        bound_(model, kk.bound.Clamp(kk.schedule.Linear(2.0, 1.0, steps=(0, 9))))


@only("torch")
def test_gains_of_normalisation_layers_are_spared_unless_they_are_selected() -> None:
    class ScaleNorm(layers.Layer):
        def build(self, shape: Any) -> None:
            self.gain = self.add_weight(shape=(shape[-1],), initializer="ones", name="gain")

        def call(self, inputs: Any) -> Any:
            return self.gain * inputs

    def built() -> Any:
        norms = [layers.BatchNormalization(name="a"), layers.RMSNormalization(name="b")]
        return network(layers.Dense(2, name="d"), *norms, ScaleNorm(name="c"))

    model = built()
    gains = ["net/a/gamma", "net/b/scale", "net/c/gain"]
    outcome = bound_(model, kk.bound.Clamp(0.1))
    assert [n for n, why in outcome.left_alone.items() if "only='*'" in why] == gains
    assert list(outcome.names) == ["net/d/kernel", "net/d/bias", "net/a/beta"]
    assert numbers(model.get_layer("a").gamma).tolist() == [1.0, 1.0]
    with pytest.warns(UserWarning, match="net/b/scale, net/c/gain, but a saved model will not"):
        assert set(gains) <= set(bound_(built(), kk.bound.Clamp(0.1), only="*").names)
    outcome = bound_(built(), kk.bound.Clamp(0.1), only="*gamma")
    assert list(outcome.names) == ["net/a/gamma"]
    assert outcome.left_alone["net/d/kernel"] == "not selected"
    with pytest.raises(Unsupported, match="no selected weight can be bounded.*a gain"):
        bound_(built(), kk.bound.Clamp(0.1), exclude=["d", "*beta"])
