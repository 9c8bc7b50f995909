"""Pruning of Keras models on each backend: any kind of model, in fit and in loops, saved, killed and resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")
layers = keras.layers

import karikomi as kk  # noqa: E402
from karikomi.errors import BadFile, InvalidArgument, NonFinite, UnknownName, Unsupported  # noqa: E402
from karikomi.keras import Masks, Pruning, clipped, prune_, strip_  # noqa: E402
from karikomi.keras.callbacks.schedule_fingerprint import described  # noqa: E402
from keras_backends import BACKEND, only, sampled, slow_on  # noqa: E402

RNG = np.random.default_rng(7)
INPUTS = RNG.normal(size=(48, 6)).astype("float32")
TARGETS = (INPUTS @ RNG.normal(size=(6, 3))).astype("float32")
BATCHES = [(INPUTS[:24], TARGETS[:24]), (INPUTS[24:], TARGETS[24:])]
IMAGES = RNG.normal(size=(12, 6, 6, 2)).astype("float32")
LOSS = keras.losses.MeanSquaredError()


def network(seed: int = 0, name: str = "net", regularizer: Any = None) -> Any:
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(16, "relu", kernel_regularizer=regularizer, name="hidden"),
            layers.Dense(3, name="head"),
        ],
        name=name,
    )


def convolutional() -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, padding="same", name="one"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="two"),
            layers.Flatten(),
            layers.Dense(3, name="head"),
        ],
        name="net",
    )


def array(variable: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(variable))


def compiled(model: Any, optimizer: Any = None, **options: Any) -> Any:
    model.compile(optimizer or keras.optimizers.Adam(0.01), LOSS, **options)
    return model


def fit(model: Any, *callbacks: Any, **options: Any) -> Any:
    settings = {"batch_size": 8, "shuffle": False, "verbose": 0, "epochs": 1, **options}
    model.fit(INPUTS, TARGETS, callbacks=list(callbacks), **settings)
    return model


def zeros(model: Any) -> int:
    return sum(int((array(v) == 0).sum()) for v in model.trainable_variables if v.name == "kernel")


class Strange(layers.Layer):
    """A layer that karikomi does not know."""

    def build(self, shape: Any) -> None:
        self.mixing = self.add_weight(shape=(shape[-1], shape[-1]), name="mixing")

    def call(self, inputs: Any) -> Any:
        return inputs + keras.ops.matmul(inputs, self.mixing)


class Subclassed(keras.Model):
    """No graph: a shared layer, a nested model and an unknown layer."""

    def __init__(self) -> None:
        super().__init__(name="own")
        self.first = layers.Dense(6, activation="relu", name="first")
        self.nested = network(name="nested")
        self.strange = Strange(name="strange")

    def call(self, inputs: Any) -> Any:
        return self.nested(self.strange(self.first(self.first(inputs))))


def subclassed() -> Any:
    keras.utils.set_random_seed(0)
    model = Subclassed()
    model(INPUTS)
    return model


def test_exactly_as_many_go_as_are_asked_for_and_ties_break_by_order() -> None:
    model = network()
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))
    masks = prune_(model, sparsity=0.5)
    assert masks.sparsity == 0.5 and zeros(model) == 72
    assert masks.counts() == {"net/hidden/kernel": (72, 96), "net/head/kernel": (0, 48)}
    # Units first, then inputs: as torch, whose kernels lie the other way round.
    assert not masks["net/hidden/kernel"].T.reshape(-1)[:72].any()
    assert masks.left_alone == {"net/hidden/bias": "a bias", "net/head/bias": "a bias"}


@slow_on("jax")
def test_the_error_of_several_outputs_is_that_over_all_of_them() -> None:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    heads = [layers.Dense(n, name=f"head{n}")(inputs) for n in (4, 3)]
    best = keras.ops.argmax(heads[0], 1)
    model = keras.Model(inputs, {"a": heads[0], "b": [heads[1]], "best": best})
    one = keras.Model(inputs, keras.ops.concatenate(heads, 1))
    dense = keras.ops.convert_to_numpy(one(INPUTS))
    masks = prune_(model, sparsity=0.5, data=[INPUTS])
    moved = np.linalg.norm(dense - keras.ops.convert_to_numpy(one(INPUTS)))
    assert masks.account.output_error == pytest.approx(moved / np.linalg.norm(dense), rel=1e-4)


@slow_on("jax")
@pytest.mark.parametrize("score", ["snip", "fisher", "wanda"])
def test_scores_that_need_data(score: str) -> None:
    model = network()
    masks = prune_(model, sparsity=0.6, score=score, data=BATCHES, loss=LOSS)
    assert zeros(model) == round(0.6 * 144)
    assert masks.account.output_error is not None and masks.account.output_error > 0
    assert all(row.why for row in masks.account.rows)


def test_gradients_are_those_of_the_loss_and_leave_nothing_behind() -> None:
    from karikomi.keras.facts.measure import measure
    from karikomi.keras.layers.prunable import oriented

    model = network()
    found = oriented(model, where="test")
    wanted = {"net/head/kernel": found["net/head/kernel"]}
    before = [array(one) for one in model.weights]
    needs = frozenset({"gradient", "input_norm", "zeros", "output", "deviation", "macs"})
    facts = measure(model, needs, wanted, data=BATCHES, loss=LOSS, where="test")
    hidden = np.maximum(INPUTS @ before[0] + before[1], 0)
    error = hidden @ before[2] + before[3] - TARGETS
    expected = 2 * hidden.T @ error / error.size
    np.testing.assert_allclose(facts["gradient"]["net/head/kernel"], expected, rtol=1e-4, atol=1e-6)
    norms = np.linalg.norm(hidden, axis=0)
    np.testing.assert_allclose(facts["input_norm"]["net/head/kernel"][:, 0], norms, rtol=1e-5)
    outputs = error + TARGETS
    np.testing.assert_allclose(
        facts["output"]["net/head/kernel"], np.abs(outputs).mean(0), rtol=1e-5
    )
    np.testing.assert_allclose(facts["deviation"]["net/head/kernel"], outputs.std(0), rtol=1e-5)
    assert facts["macs"]["net/head/kernel"] == 48
    first = {"net/hidden/kernel": found["net/hidden/kernel"]}
    shares = measure(model, frozenset({"zeros"}), first, data=BATCHES, loss=None, where="test")
    np.testing.assert_allclose(shares["zeros"]["net/hidden/kernel"], (hidden == 0).mean(axis=0))
    assert all(np.array_equal(array(a), b) for a, b in zip(model.weights, before, strict=True))
    assert all("call" not in vars(layer) for layer in model.layers)


def test_norms_of_the_inputs_of_convolutions() -> None:
    from karikomi.keras.facts.measure import measure
    from karikomi.keras.layers.prunable import oriented

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False, name="plain"),
            layers.DepthwiseConv2D(3, dilation_rate=1, use_bias=False, name="deep"),
        ],
        name="net",
    )
    found = oriented(model, where="test")
    wanted = {name: found[name] for name in ("net/plain/kernel", "net/deep/kernel")}
    facts = measure(
        model, frozenset({"input_norm", "macs"}), wanted, data=[IMAGES], loss=None, where="test"
    )
    padded = np.pad(IMAGES, [(0, 0), (0, 1), (0, 1), (0, 0)]).astype(np.float64)
    for row, column in ((0, 0), (2, 1)):
        seen = padded[:, row : row + 5 : 2, column : column + 5 : 2]
        norms = np.sqrt(np.square(seen).sum(axis=(0, 1, 2)))
        got = facts["input_norm"]["net/plain/kernel"][row, column, :, 0]
        np.testing.assert_allclose(got, norms, rtol=1e-5)
    assert facts["macs"] == {"net/plain/kernel": 9 * 72, "net/deep/kernel": 36}


def test_units_take_bias_and_norm_with_them_and_put_out_zero() -> None:
    model = convolutional()
    masks = prune_(model, width=0.5, pattern="units", data=[IMAGES])
    assert masks.counts()["net/one/kernel"] == (36, 72)
    gone = ~masks["net/norm/gamma"]
    assert gone.sum() == 2 and np.array_equal(gone, ~masks["net/norm/beta"])
    inside = keras.Model(model.inputs[0], model.get_layer("relu").output)
    outputs = array(inside(IMAGES))
    assert (outputs[..., gone] == 0).all() and (outputs[..., ~gone] != 0).any()
    assert masks.left_alone["net/head/kernel"].startswith("the last layer")


def test_scores_of_units() -> None:
    model = convolutional()
    model.get_layer("norm").gamma.assign([1.0, 0.1, 2.0, 0.2])
    masks = prune_(
        model, width=0.5, pattern="units", score="bn_scale", data=[IMAGES], only="*one/kernel"
    )
    assert masks["net/norm/gamma"].tolist() == [True, False, True, False]
    with pytest.raises(Unsupported, match="no one normalisation"):
        prune_(convolutional(), width=0.5, pattern="units", score="bn_scale", data=[IMAGES])
    prune_(convolutional(), width=0.5, pattern="units", score="apoz", data=[IMAGES])


@slow_on("jax")
def test_heads_go_as_one() -> None:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    attention = layers.MultiHeadAttention(4, 2, name="attention")
    model = keras.Model(inputs, attention(inputs, inputs), name="net")
    masks = prune_(model, width=0.5, pattern="heads")
    query = masks["attention/query/kernel"]
    alive = query.any(axis=(0, 2))
    assert alive.sum() == 2 and np.array_equal(query.all(axis=(0, 2)), alive)
    assert np.array_equal(masks["attention/attention_output/kernel"].all(axis=(1, 2)), alive)
    assert np.array_equal(masks["attention/value/bias"].all(axis=1), alive)
    rows = prune_(model, sparsity=0.75, score="wanda", data=[np.ones((2, 5, 8))])
    assert rows.sparsity == 0.75


def test_any_kind_of_model_and_what_is_left_alone_is_named() -> None:
    model = subclassed()
    masks = prune_(model, sparsity=0.5, score="wanda", data=BATCHES)
    reason = masks.left_alone[next(name for name in masks.left_alone if "mixing" in name)]
    assert reason == "mixing of Strange: no kernel of a Dense or Conv layer"
    # The shared layer counts once.
    assert sum(size for _, size in masks.counts().values()) == 36 + 96 + 48
    model = compiled(subclassed())
    pruning = Pruning(kk.prune.OneShot(0.5, step=2))
    fit(model, pruning)
    assert pruning.masks.sparsity == 0.5 and zeros(model) >= 90


def test_n_of_m_blocks_and_budgets() -> None:
    model = convolutional()
    masks = prune_(model, pattern=kk.prune.NofM(keep=1, of=4))
    assert (masks["net/two/kernel"].sum(axis=2) == 1).all()
    assert masks.left_alone["net/one/kernel"].startswith("4 does not divide")
    prune_(convolutional(), sparsity=0.5, pattern=kk.prune.Blocks(2, 1))
    model = convolutional()
    parameters = sum(array(one).size for one in model.trainable_variables)
    masks = prune_(model, parameters=0.5)
    assert sum(gone for gone, _ in masks.counts().values()) == -(-parameters // 2)
    assert prune_(convolutional(), macs=0.5, data=[IMAGES]).sparsity > 0.3


def test_masks_on_disk_take_a_bit_per_weight(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), layers.Dense(512, name="wide")], name="net")
    masks = prune_(model, sparsity=0.9)
    masks.save(tmp_path / "masks.safetensors")
    assert os.path.getsize(tmp_path / "masks.safetensors") < 64 * 512 / 8 + 400
    again = Masks.load(tmp_path / "masks.safetensors")
    assert np.array_equal(again["net/wide/kernel"], masks["net/wide/kernel"])
    state = Masks.from_state_dict(masks.state_dict())
    assert state.counts() == masks.counts()
    (tmp_path / "cut").write_bytes((tmp_path / "masks.safetensors").read_bytes()[:-9])
    for name in ("cut", "none"):
        with pytest.raises(BadFile, match="not a file of masks"):
            Masks.load(tmp_path / name)


def test_masks_find_a_model_that_was_built_again() -> None:
    masks = prune_(network(name="net"), sparsity=0.5)
    other = network(name="other")
    masks.apply_(other)
    assert zeros(other) == 72
    Masks({name.partition("/")[2]: mask for name, mask in masks.items()}).apply_(network())
    with pytest.raises(UnknownName, match="no such variable"):
        masks.apply_(convolutional())
    with pytest.raises(InvalidArgument, match="does not fit"):
        Masks({"net/head/kernel": np.ones((2, 2), bool)}).apply_(other)


CASES = {
    "torch": ["plain", "clipped", "accumulated", "half"],
    "jax": ["plain", "clipped", "executions", "half"],  # compiled, as by default
    "tensorflow": ["plain", "clipped", "jit", "executions", "accumulated", "half"],
}


@pytest.mark.parametrize("case", sampled(CASES[BACKEND], "steps of fit", most=3))
def test_masks_hold_in_every_step_of_fit(case: str) -> None:
    options: dict[str, Any] = {"jit_compile": True} if case == "jit" else {}
    if case == "executions":
        options["steps_per_execution"] = 3
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.01, use_ema=case == "plain")
    if case == "accumulated":
        optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=2)
    if case == "clipped":
        optimizer = clipped(optimizer, kk.clip.ByGlobalNorm(0.1), bound=kk.bound.Clamp(0.3))
    policy = "mixed_float16" if case == "half" else "float32"
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(network(), optimizer, **options)
        pruning = Pruning(kk.prune.Gradual(0.8, steps=(1, 7), every=3))
        seen: list[tuple[int, int]] = []
        look = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: seen.append((batch, zeros(pruning.model)))
        )
        fit(model, pruning, look, epochs=3)
        model.predict(INPUTS, verbose=0)
    finally:
        keras.config.set_dtype_policy(before)
    assert pruning.masks.sparsity == pytest.approx(0.8, abs=0.005)
    counts = [count for _, count in seen]
    assert counts == sorted(counts) and counts[-1] == round(0.8 * 144) == zeros(model)
    weights = {one.path: array(one) for one in model.trainable_variables}
    assert all((weights[name][~mask] == 0).all() for name, mask in pruning.masks.items())
    assert all((weights[name][mask] != 0).any() for name, mask in pruning.masks.items())


def test_moments_of_masked_weights_are_zero_and_the_clip_does_not_see_their_gradients() -> None:
    inner = keras.optimizers.Adam(0.01)
    model = compiled(network(), clipped(inner, kk.clip.ByGlobalNorm(np.inf)))
    masks = Masks({"net/hidden/kernel": np.zeros((6, 16), bool)})
    fit(model, Pruning(masks=masks))
    tops = [name for name, share in model.optimizer.inner_optimizer.last.top(9) if share > 0]
    assert "net/head/bias" in tops and "net/hidden/kernel" not in tops
    place = [one.path for one in model.trainable_variables].index("net/hidden/kernel")
    assert not array(inner._velocities[place]).any() and array(inner._velocities[3]).any()
    pruning = Pruning(kk.prune.OneShot(0.5, step=3))
    model = compiled(network(), "adam")
    fit(model, pruning)
    inner = model.optimizer.inner_optimizer
    kept = pruning.masks["net/hidden/kernel"]
    momentum = array(inner._momentums[place])
    assert (momentum[~kept] == 0).all() and momentum[kept].any()


def trained(path: Path, stop: int | None, how: str) -> Any:
    """Return the weights after four epochs, with a kill and a fresh start after `stop` of them."""

    def fresh() -> tuple[Any, Any]:
        optimizer = clipped(keras.optimizers.Adam(0.02), kk.clip.AutoClip(50))
        model = network(regularizer=kk.keras.Penalty(kk.prune.L1(1e-3)))
        kk.keras.bound_(model, kk.bound.MaxNorm(1.5), only="head")
        return compiled(model, optimizer), Pruning(kk.prune.Gradual(0.8, steps=(2, 20), every=5))

    class Killed(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == stop:
                raise KeyboardInterrupt

    model, pruning = fresh()
    save: Any = keras.callbacks.ModelCheckpoint(path / "model.keras")
    if how == "backup":
        save = keras.callbacks.BackupAndRestore(path / "backup")
    if stop is None:
        fit(model, pruning, epochs=4)
        return model, pruning
    with pytest.raises(KeyboardInterrupt):
        fit(model, save, pruning, Killed(), epochs=4)
    model, pruning = fresh()
    if how == "backup":
        fit(model, save, pruning, epochs=4)
    else:
        model = keras.models.load_model(path / "model.keras")
        fit(model, pruning, epochs=4, initial_epoch=stop)
    return model, pruning


@pytest.mark.parametrize("how", sampled(["file", "backup"], "killed"))
def test_killed_and_resumed_is_not_to_have_been_killed(tmp_path: Path, how: str) -> None:
    whole, pruning = trained(tmp_path, None, how)
    resumed, again = trained(tmp_path, 2, how)
    assert again.masks.sparsity == pruning.masks.sparsity > 0.79
    for one, other in zip(whole.weights, resumed.weights, strict=True):
        assert np.array_equal(array(one), array(other)), one.path


def test_a_saved_model_goes_on_with_its_masks_and_can_be_stripped(tmp_path: Path) -> None:
    model, pruning = compiled(network()), Pruning(kk.prune.OneShot(0.75))
    names, config = [one.name for one in model.layers], json.dumps(model.get_config())
    fit(model, pruning)
    assert [one.name for one in model.layers] == names and json.dumps(model.get_config()) == config
    model.save(tmp_path / "model.keras")
    plain = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert zeros(plain) == 108
    loaded = keras.models.load_model(tmp_path / "model.keras")
    fit(loaded)  # without the callback: the optimizer holds the masks
    assert zeros(loaded) == 108
    strip_(loaded)
    assert isinstance(loaded.optimizer, keras.optimizers.Adam)
    loaded.save(tmp_path / "plain.keras")
    again = keras.models.load_model(tmp_path / "plain.keras")
    assert isinstance(again.optimizer, keras.optimizers.Adam)
    fit(again)
    assert zeros(again) < 60


def test_given_masks_are_held_and_then_a_schedule_goes_on_from_them() -> None:
    model = network()
    masks = prune_(model, sparsity=0.5)
    fit(compiled(model), Pruning(masks=masks))
    assert zeros(model) == 72
    pruning = Pruning(kk.prune.Iterative(0.9, steps=(1, 5), rounds=2))
    seen: list[int] = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(zeros(pruning.model))
    )
    fit(model, pruning, look)
    # Its steps begin with it, and it has half of the way behind it.
    assert seen == [98, 98, 98, 98, 130, 130]
    grown = [pruning.masks[name] & ~masks[name] for name in masks]
    assert zeros(model) == 130 and not any(one.any() for one in grown)


def as_any(wrong: Any) -> Any:
    return wrong


def steps_of_ones_own(model: Any, masks: Masks) -> None:
    variables, optimizer = model.trainable_variables, keras.optimizers.Adam(0.05)
    optimizer.build(variables)
    from karikomi.keras.facts.gradients import gradients

    for inputs, targets in BATCHES * 2:
        own = gradients(model, variables, lambda out, y=targets: LOSS(y, out), inputs)
        optimizer.apply(masks.mask_gradients(own, variables), variables)
        masks.apply_(model)


def test_a_loop_of_ones_own() -> None:
    model = network()
    masks = prune_(model, sparsity=0.75)
    before = array(model.layers[0].kernel)
    steps_of_ones_own(model, masks)
    assert zeros(model) == 108 and not np.array_equal(before, array(model.layers[0].kernel))


def test_frozen_weights_are_left_alone_by_a_schedule() -> None:
    model = network()
    model.layers[0].trainable = False
    before = array(model.layers[0].kernel)
    pruning = Pruning(kk.prune.OneShot(0.5))
    fit(compiled(model), pruning)
    assert list(pruning.masks) == ["net/head/kernel"]
    assert pruning.masks.left_alone["net/hidden/kernel"] == "it is not trained"
    assert np.array_equal(before, array(model.layers[0].kernel))


@slow_on("jax", "tensorflow")
def test_the_same_accuracy_as_before_at_90_percent() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    pixels, classes = digits[0].astype("float32") / 16, digits[1]
    order = np.random.default_rng(0).permutation(len(pixels))
    train, test = order[400:], order[:400]
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((64,)), layers.Dense(128, activation="relu"), layers.Dense(10)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(5e-3), loss, metrics=["accuracy"])
    pruning = Pruning(kk.prune.Gradual(0.9, steps=(40, 160), every=10))
    model.fit(
        pixels[train], classes[train], batch_size=64, epochs=15, verbose=0, callbacks=[pruning]
    )
    assert pruning.masks.sparsity == pytest.approx(0.9, abs=1e-3)
    assert model.evaluate(pixels[test], classes[test], verbose=0)[1] >= 0.93


def nested() -> Any:
    """A model and one inside of it whose layers have the same name and the same shapes."""
    keras.utils.set_random_seed(0)
    base = keras.Sequential([keras.Input((6,)), layers.Dense(6, name="d")], name="base")
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Dense(6, name="d")(base(inputs)), name="net")


def gone(model: Any) -> list[list[bool]]:
    kernels = [one for one in model.weights if one.name == "kernel"]
    return [(array(one) == 0).reshape(-1).tolist() for one in kernels]


@pytest.mark.parametrize("which", ["base/d/kernel", "d/kernel", "*"])
def test_masks_find_their_layer_in_a_loaded_model(tmp_path: Path, which: str) -> None:
    model = nested()
    masks = prune_(model, sparsity=0.5, only=which)
    wanted = gone(model)
    masks.save(tmp_path / "masks.safetensors")
    fresh = nested()
    fresh.save(tmp_path / "model.keras")
    for kept in (masks, Masks.load(tmp_path / "masks.safetensors")):
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert [one.path for one in loaded.weights].count("d/kernel") == 2  # paths are not saved
        kept.apply_(loaded)
        assert gone(loaded) == wanted
        # And as earlier masks of another call.
        more = prune_(loaded, sparsity=0.75, masks=kept)
        more.apply_(loaded)
        assert zeros(loaded) == 54 and len(more) == 2


@only("torch")
def test_a_file_of_masks_has_the_places_of_variables_of_one_path(tmp_path: Path) -> None:
    nested().save(tmp_path / "model.keras")
    masks = prune_(keras.models.load_model(tmp_path / "model.keras"), sparsity=0.5)
    masks.save(tmp_path / "masks.safetensors")
    state = Masks.load(tmp_path / "masks.safetensors").state_dict()
    places = {name: entry["place"] for name, entry in state.items()}
    # The first and the second of two kernels of this shape, both of one path.
    assert places == {"d/kernel": [0, 2, 2], "d/kernel#2": [1, 2, 2]}


def test_no_two_masks_speak_of_one_variable_and_none_is_guessed(tmp_path: Path) -> None:
    plain, every = network(), np.zeros((6, 16), bool)
    with pytest.raises(InvalidArgument, match="two masks are of one variable"):
        Masks({"net/hidden/kernel": every, "hidden/kernel": every}).apply_(plain)
    masks = prune_(nested(), sparsity=0.5, only="base*")
    nested().save(tmp_path / "model.keras")
    frozen: Any = keras.models.load_model(tmp_path / "model.keras")
    frozen.get_layer("base").trainable = False
    variables = frozen.trainable_variables
    assert [one.path for one in variables] == ["d/kernel", "d/bias"]  # not those of the masks
    with pytest.raises(InvalidArgument, match="not clear which variable"):
        masks.mask_gradients([None] * len(variables), variables)
    with pytest.raises(InvalidArgument, match="not clear which variable"):
        Masks({"d/kernel": np.zeros((6, 6), bool)}).apply_(frozen)


def test_two_callbacks_in_one_fit_are_refused() -> None:
    first, second = Pruning(kk.prune.OneShot(0.5)), Pruning(kk.prune.OneShot(0.75))
    model = compiled(network())
    with pytest.raises(Unsupported, match="two of these callbacks"):
        fit(model, first, second)
    fit(model, second)
    assert second.masks.sparsity == 0.75


def test_what_another_callback_restores_is_masked_when_training_ends() -> None:
    # The largest loss is that of the first epoch, before anything is pruned.
    early = keras.callbacks.EarlyStopping("loss", mode="max", patience=9, restore_best_weights=True)
    model, pruning = compiled(network()), Pruning(kk.prune.OneShot(0.5, step=8))
    fit(model, early, pruning, epochs=3)
    assert early.best_epoch == 0 and pruning.masks.sparsity == 0.5
    assert all((array(v)[~mask] == 0).all() for v, mask in pruning.masks.pairs(model.weights))


@pytest.mark.parametrize("on_epoch", sampled([True, False], "averages"))
def test_averages_of_weights_are_masked(on_epoch: bool) -> None:
    seen = []

    class See(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            seen.append(zeros(self.model))

    model = compiled(network(), keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9))
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=on_epoch)
    fit(model, Pruning(kk.prune.OneShot(0.5, step=4)), swap, See(), epochs=2)
    assert seen == [72, 72] and zeros(model) == 72


def test_weights_that_are_written_after_training_are_noticed(tmp_path: Any) -> None:
    model, pruning = compiled(network()), Pruning(kk.prune.OneShot(0.5))
    dense = model.get_weights()
    fit(model, pruning)
    model.save(tmp_path / "pruned.keras")
    assert pruning.masks.sparsity == 0.5
    model.set_weights(dense)
    with pytest.warns(UserWarning, match=r"72 masked weight\(s\) of .* are not zero"):
        assert zeros(model) == 0 and pruning.masks.sparsity == 0.5
    pruning.masks.apply_(model)
    assert zeros(model) == 72


def test_a_model_that_is_saved_with_written_weights_warns(tmp_path: Any) -> None:
    model, pruning = compiled(network()), Pruning(kk.prune.OneShot(0.5))
    dense = model.get_weights()
    fit(model, pruning)
    model.set_weights(dense)
    with pytest.warns(UserWarning, match=r"72 masked weight\(s\) of .* are not zero"):
        model.save(tmp_path / "written.keras")


@slow_on("tensorflow")
def test_masks_outlast_compiling_again() -> None:
    model, pruning = compiled(network()), Pruning(kk.prune.Gradual(0.8, steps=(2, 10), every=2))
    fit(model, pruning)
    half = zeros(model)
    assert 0 < half < 115
    fit(compiled(model), pruning)
    assert zeros(model) == round(0.8 * 144)  # it goes on where it was, at step 6
    fit(compiled(model, keras.optimizers.SGD(0.1)), pruning)
    assert zeros(model) == round(0.8 * 144)
    # Another model, or weights that have come back, have no part in these masks.
    fit(compiled(network(1, "other")), pruning)
    assert pruning.masks.sparsity < 0.8


@only("torch")
def test_after_another_compile_a_schedule_goes_on_in_updates() -> None:
    def optimizer() -> Any:
        return keras.optimizers.Adam(0.01, gradient_accumulation_steps=2)

    pruning = Pruning(kk.prune.Iterative(0.75, steps=(2, 5), rounds=2))
    model = fit(compiled(network(), optimizer()), pruning)
    assert model.optimizer.steps == 3 and zeros(model) == 72
    fit(compiled(model, optimizer()), pruning)
    assert model.optimizer.steps == 6 and zeros(model) == 108


@only("torch")
def test_another_fit_from_the_same_masks_keeps_what_the_schedule_has_removed() -> None:
    model = network()
    pruning = Pruning(kk.prune.OneShot(0.75, step=2), masks=prune_(model, sparsity=0.5))
    fit(compiled(model), pruning)
    assert zeros(model) == 108
    assert zeros(fit(model, pruning)) == 108


@only("torch")
def test_evaluating_with_the_callback_leaves_the_compiled_step() -> None:
    model, pruning = fit(compiled(network())), Pruning(kk.prune.OneShot(0.5))
    step = model.train_function
    model.evaluate(INPUTS, TARGETS, verbose=0, callbacks=[pruning])
    assert step is not None and model.train_function is step


@only("torch")
def test_moments_inside_of_a_clipped_optimizer_are_forgotten() -> None:
    inner, pruning = keras.optimizers.Adam(0.01), Pruning(kk.prune.OneShot(0.5, step=6))
    fit(compiled(network(), clipped(inner, kk.clip.ByGlobalNorm(1.0))), pruning)
    kept = pruning.masks["net/hidden/kernel"]
    momentum = array(inner._momentums[0])
    assert not kept.all() and not momentum[~kept].any() and momentum[kept].any()


@only("torch")
def test_earlier_masks_of_other_layers_stay() -> None:
    model = network()
    first = prune_(model, sparsity=0.5, only="*hidden*")
    both = prune_(model, sparsity=0.25, only="*head*", masks=first)
    assert both.counts() == {"net/hidden/kernel": (48, 96), "net/head/kernel": (12, 48)}


@only("torch")
def test_the_error_of_the_model_is_that_over_all_batches() -> None:
    model = network()
    batches = [9.0 * INPUTS[:12], INPUTS[12:16]]
    dense = array(model(np.concatenate(batches)))
    masks = prune_(model, sparsity=0.5, data=batches)
    moved = np.linalg.norm(dense - array(model(np.concatenate(batches))))
    assert masks.account.output_error == pytest.approx(moved / np.linalg.norm(dense), rel=1e-4)


@only("torch")
def test_the_shift_of_a_norm_goes_with_its_unit() -> None:
    model = convolutional()
    model.get_layer("norm").beta.assign([1.0, 2.0, 3.0, 4.0])
    masks = prune_(model, width=0.5, pattern="units", data=[IMAGES], only="*one/kernel")
    gone = np.flatnonzero(~masks["net/one/bias"])
    assert len(gone) == 2 and np.flatnonzero(~masks["net/norm/beta"]).tolist() == gone.tolist()
    kept = np.where(masks["net/one/bias"], [1.0, 2.0, 3.0, 4.0], 0.0)
    assert array(model.get_layer("norm").beta).tolist() == kept.tolist()


@only("torch")
def test_values_of_heads_have_a_width_of_their_own() -> None:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 8))
    attention = layers.MultiHeadAttention(4, 2, value_dim=3, name="attention")
    model = keras.Model(inputs, attention(inputs, inputs), name="net")
    masks = prune_(model, width=0.25, pattern="heads")
    alive = masks["attention/query/kernel"].any(axis=(0, 2))
    assert alive.sum() == 1
    assert np.array_equal(masks["attention/value/kernel"].all(axis=(0, 2)), alive)
    assert masks.counts()["attention/value/kernel"] == (3 * 8 * 3, 4 * 8 * 3)


@only("torch")
def test_the_text_of_a_schedule_does_not_depend_on_any_order() -> None:
    one, other = ({"a": 1, "b": {"x", "y"}}, {"b": {"y", "x"}, "a": 1})
    assert described(one, where="w") == described(other, where="w") == "{'a': 1, 'b': {'x', 'y'}}"


@slow_on("tensorflow")
def test_weights_of_a_pruned_model_without_its_masks_are_warned_of(tmp_path: Path) -> None:
    model, pruning = compiled(network()), Pruning(kk.prune.OneShot(0.75))
    fit(model, pruning)
    weights = [array(one) for one in model.weights]
    other = network()
    other.set_weights(weights)
    with pytest.warns(UserWarning, match="no masks are known"):
        fit(compiled(other), Pruning(kk.prune.OneShot(0.5, step=99)))
    other.set_weights(weights)
    fit(compiled(other), Pruning(kk.prune.OneShot(0.5, step=99), masks=pruning.masks))
    assert zeros(other) == 108
    model.save_weights(tmp_path / "a.weights.h5")
    fresh = compiled(network())
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        fresh.load_weights(tmp_path / "a.weights.h5")
    fit(fresh, pruning)
    assert zeros(fresh) == 108


class Own(kk.prune.Magnitude):
    """A score that is no dataclass, and whose `repr` is an address."""

    def __init__(self, power: Any = 1.0) -> None:
        object.__setattr__(self, "power", power)

    __repr__ = object.__repr__


def test_a_schedule_with_a_score_of_ones_own_goes_on() -> None:
    model = compiled(network())
    fit(model, Pruning(kk.prune.OneShot(0.5, step=8, score=Own(2.0))))
    attempts = model.optimizer.attempts
    fit(model, Pruning(kk.prune.OneShot(0.5, step=8, score=Own(2.0))))
    assert attempts == 6 and model.optimizer.attempts == 12 and zeros(model) == 72
    fit(model, Pruning(kk.prune.OneShot(0.5, step=8, score=Own(3.0))))
    assert model.optimizer.attempts == 6
    with pytest.raises(InvalidArgument, match=r"schedule\.score\.power: this cannot be identified"):
        Pruning(kk.prune.OneShot(0.5, score=Own(np.ones(3))))


def test_a_subclassed_model_that_is_not_built_is_pruned_in_fit() -> None:
    for model in (Subclassed(), keras.Sequential([layers.Dense(6), layers.Dense(3)])):
        pruning = Pruning(kk.prune.OneShot(0.5, step=2))
        fit(compiled(model), pruning)
        assert pruning.masks.sparsity == 0.5 and zeros(model) >= 27
        assert model.optimizer.attempts == 6
    model = Subclassed()
    masks = {"own/first/kernel": np.zeros((6, 6), bool)}
    seen: list[int] = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(zeros(look.model))
    )
    fit(compiled(model), Pruning(masks=Masks(masks)), look)
    assert seen == [36] * 6  # from the first step on


def two_headed(kind: str) -> Any:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, name="hidden")(inputs)
    heads = {"a": layers.Dense(3, name="a")(hidden), "b": layers.Dense(2, name="b")(hidden)}
    return keras.Model(inputs, heads if kind == "dict" else list(heads.values()), name="net")


@slow_on("jax")
@pytest.mark.parametrize("kind", ["dict", "list"])
def test_models_with_several_outputs_are_measured(kind: str) -> None:
    def loss(outputs: Any, targets: Any) -> Any:
        pairs = zip(keras.tree.flatten(outputs), keras.tree.flatten(targets), strict=True)
        return sum(keras.ops.mean(keras.ops.square(one - other)) for one, other in pairs)

    targets: Any = {"a": TARGETS, "b": TARGETS[:, :2]}
    targets = targets if kind == "dict" else list(targets.values())
    for score in ("snip", "wanda"):
        model = two_headed(kind)
        masks = prune_(model, 0.5, score=score, data=[(INPUTS, targets)], loss=loss)
        assert masks.sparsity == 0.5 and zeros(model) == 44


def test_evaluating_with_the_callback_leaves_the_optimizer() -> None:
    model, pruning = compiled(network()), Pruning(masks=prune_(network(), sparsity=0.5))
    fit(model)
    before, weights = model.optimizer, array(model.layers[0].kernel)
    model.evaluate(INPUTS, TARGETS, verbose=0, callbacks=[pruning])
    model.predict(INPUTS, verbose=0, callbacks=[pruning])
    assert model.optimizer is before and np.array_equal(weights, array(model.layers[0].kernel))
    fit(model, pruning)
    own, masks = model.optimizer, pruning.masks
    model.evaluate(INPUTS, TARGETS, verbose=0, callbacks=[pruning])
    assert model.optimizer is own is not before and pruning.masks is masks and zeros(model) == 72


class Mine(kk.prune.PruningSchedule):
    """A schedule of one's own, of a field that is left out or says nothing known."""

    def __init__(self, **wrong: Any) -> None:
        fields = {"sparsity": 0.5, "score": "magnitude", "allocation": None}
        fields |= {"pattern": "unstructured", "only": None, **wrong}
        for name, value in fields.items():
            setattr(self, name, value)


@only("torch")
@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: prune_(network()), InvalidArgument, "one target"),
        (lambda: prune_(network(), 50), InvalidArgument, "share above 1"),
        (lambda: prune_(network(), 0.5, score="snip"), InvalidArgument, "pass data="),
        (lambda: prune_(network(), 0.5, score="snip", data=BATCHES), InvalidArgument, "pass loss="),
        (lambda: prune_(network(), 0.5, score="grasp", data=BATCHES), Unsupported, "not measured"),
        (lambda: prune_(network(), 0.5, score="obc", data=BATCHES), Unsupported, "reconstruction"),
        (lambda: prune_(network(), 0.5, data=iter(BATCHES)), InvalidArgument, "read again"),
        (lambda: prune_(network(), 0.5, data=BATCHES[0]), InvalidArgument, "read again"),
        (lambda: prune_(network(), 0.5, only="hiden*"), UnknownName, "hidden"),
        (lambda: prune_(network(), 0.5, only="*/*i*s"), Unsupported, "nothing of this"),
        (lambda: prune_(network(), 0.5, protect=("norm",)), UnknownName, "norms"),
        (lambda: prune_(network(), width=0.5, pattern="heads"), Unsupported, "no attention"),
        (lambda: prune_(keras.Sequential(), 0.5), InvalidArgument, "no variables yet"),
        (lambda: prune_(3, 0.5), InvalidArgument, "not a Keras model"),
        (lambda: Pruning(), InvalidArgument, "schedule or masks"),
        (lambda: Pruning(kk.prune.OneShot(0.5, score="movement")), Unsupported, "not measured"),
        (lambda: Pruning(as_any(kk.prune.Gradual)), InvalidArgument, "not a schedule"),
        (lambda: Pruning(Mine()), InvalidArgument, "Mine: .*got no exclude"),
        (lambda: Pruning(Mine(exclude=5)), InvalidArgument, "Mine.exclude"),
        (lambda: Pruning(Mine(exclude=None, score="magnitud")), UnknownName, "'magnitude'"),
        (lambda: Pruning(Mine(exclude=None, pattern="unitts")), UnknownName, "'units'"),
        (lambda: Pruning(Mine(exclude=None, allocation="globl")), UnknownName, "'global'"),
        (lambda: Pruning(masks=as_any({"a": 1})), InvalidArgument, "kk.keras.Masks"),
        (
            lambda: Pruning(kk.prune.Iterative(0.5, steps=(5, 9), rounds=2, rewind=1)),
            *(Unsupported, "rewinds"),
        ),
        (lambda: Pruning(masks=Masks()).set_model(network()), Unsupported, "not compiled"),
    ],
)
def test_what_is_refused(call: Callable[[], Any], error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        call()


@only("torch")
def test_a_weight_that_is_not_finite_is_named() -> None:
    model = network()
    model.layers[0].kernel.assign(np.full((6, 16), np.nan))
    with pytest.raises(NonFinite, match="net/hidden/kernel"):
        prune_(model, 0.5)


@only("torch")
def test_whole_units_are_rounded_as_elsewhere() -> None:
    for rounding, share in (("up", 0.5), ("nearest", 0.25)):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(2)])
        masks = prune_(model, sparsity=0.3, pattern="units", rounding=rounding)
        assert all(1 - float(np.mean(np.asarray(mask))) == share for mask in masks.values())
