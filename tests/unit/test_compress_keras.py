"""Trained Keras models into `compress`: forms of data, what they were compiled with, what comes out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

keras = pytest.importorskip("keras")

import karikomi as kk  # noqa: E402
from karikomi.errors import InvalidArgument, KarikomiError, Unsupported  # noqa: E402
from karikomi.keras.tasks.distilled_loss import DistilledLoss, can_distil, joined  # noqa: E402
from karikomi.keras.tasks.trained import compiled_of, copies_of, examples  # noqa: E402
from karikomi.keras.tasks.training import KerasTraining  # noqa: E402
from karikomi.tasks import Data, Phase, Recipe, Split, Task  # noqa: E402
from karikomi.tasks.metrics import (  # noqa: E402
    binary_accuracy,
    categorical_accuracy,
)
from keras_backends import sampled, slow_on  # noqa: E402

RECIPE = {"batch_size": 50, "learning_rate": 1e-2, "prune_epochs": 2, "tune_epochs": 1}
RECIPE |= {"widths": (0.5,), "sparsities": (0.3,), "entries": (8,), "rates": ()}


def pairs(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.random.default_rng(seed).standard_normal((n, 6), np.float32)
    return inputs, (inputs[:, :3] - inputs[:, 3:]).argmax(1)


def network() -> Any:
    """Return a network of 40 hidden units that is exactly right: six of its units are what counts."""
    net = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(40, "relu", name="hidden"),
            keras.layers.Dense(3, "softmax", name="head"),
        ],
        name="net",
    )
    generator = np.random.default_rng(0)
    first = generator.normal(0, 0.01, (6, 40)).astype(np.float32)
    last = generator.normal(0, 0.01, (40, 3)).astype(np.float32)
    for k in range(3):
        first[:, 2 * k] = 2 * (np.eye(6)[k] - np.eye(6)[k + 3])
        first[:, 2 * k + 1] = -first[:, 2 * k]
        last[2 * k], last[2 * k + 1] = 3 * np.eye(3)[k], -3 * np.eye(3)[k]
    net.set_weights([first, np.zeros(40), last, np.zeros(3)])
    net.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return net


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    net, out = network(), tmp_path_factory.mktemp("run") / "net"
    return net, out, run(net, out)


def run(net: Any, out: Path, **more: Any) -> Any:
    data = {"train": pairs(200, 0), "validation": pairs(150, 1), "test": pairs(300, 2)}
    given = {**data, "config": RECIPE, "max_drop": 0.2, "max_parameters": 250, **more}
    return kk.compress(net, out=out, progress=False, **given)


@slow_on("tensorflow")
def test_a_compiled_model_becomes_a_smaller_one(whole: tuple[Any, Path, Any]) -> None:
    net, folder, result = whole
    before = [weight.copy() for weight in net.get_weights()]
    assert result["verified"] and result["metric"] == "accuracy" and result["framework"] == "keras"
    assert result["metric_before"] > 0.99 and result["verdict"] == "held", result["candidates"]
    assert all(np.array_equal(a, b) for a, b in zip(before, network().get_weights(), strict=True))
    small = result.model
    assert (
        small.get_layer("hidden").units <= 24 and result["parameters_after"] == small.count_params()
    )
    inputs, targets = pairs(300, 2)
    right = small.predict(inputs, verbose=0).argmax(1) == targets
    assert result["metric_after"] == pytest.approx(right.mean())
    rows = list(kk.record.read(result["record"]))
    stages = {row["stage"] for row in rows if row["event"] == "step"}
    assert any(stage.startswith("width-0.5") for stage in stages)
    assert any("quantize" in stage for stage in stages)
    assert all(row["norm"] > 0 for row in rows if row["event"] == "step")
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(result))


@slow_on("tensorflow")
def test_the_model_file_needs_no_karikomi(whole: tuple[Any, Path, Any]) -> None:
    _, folder, result = whole
    rows = {row["form"]: row for row in result["exports"]}
    assert rows["keras"]["difference"] == 0 and rows["safetensors"]["difference"] == 0
    other = keras.models.load_model(folder / "model.keras")
    inputs, _ = pairs(50, 3)
    assert np.array_equal(other.predict(inputs, verbose=0), result.model.predict(inputs, verbose=0))
    assert "karikomi" not in json.dumps(other.get_config())
    again = kk.load(kk.save(result.model, folder.parent / "again.karikomi"))
    assert [a.shape for a in again.values()] == [a.shape for a in kk.load(result["file"]).values()]


@slow_on("tensorflow")
def test_a_file_fills_a_model_whose_layers_are_numbered_anew(tmp_path: Path) -> None:
    def unnamed() -> Any:
        layers = [
            keras.layers.Dense(*shape) for shape in ((12, "relu"), (9, "relu"), (3, "softmax"))
        ]
        return keras.Sequential([keras.Input((6,)), *layers])

    keras.utils.set_random_seed(0)
    net = unnamed()
    net.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    net.fit(*pairs(400, 0), batch_size=20, epochs=4, verbose=0)
    data = {"validation": pairs(150, 1), "test": pairs(300, 2)}
    config = {"rates": [4.0], "widths": [], "entries": [16]}
    told = {"config": config, "max_drop": 0.5}
    result = kk.compress(net, out=tmp_path / "a", progress=False, **data, **told)
    inputs, _ = pairs(50, 3)
    filled = kk.load(result["file"], into=unnamed())
    measured = dict(
        zip(("loss", "accuracy"), result.model.evaluate(*pairs(300, 2), verbose=0), strict=True)
    )
    assert measured["accuracy"] == pytest.approx(result["metric_after"])
    assert np.array_equal(
        filled.predict(inputs, verbose=0), result.model.predict(inputs, verbose=0)
    )


@slow_on("tensorflow")
def test_a_file_of_a_smaller_model_names_the_one_to_load(whole: tuple[Any, Path, Any]) -> None:
    _, folder, _ = whole
    layers = [keras.layers.Dense(width) for width in (40, 3)]
    other = keras.Sequential([keras.Input((6,)), *layers])
    with pytest.raises(InvalidArgument, match=r"made smaller.*model\.keras"):
        kk.load(folder / "model.karikomi", into=other)


@slow_on("tensorflow")
def test_the_same_call_resumes(whole: tuple[Any, Path, Any]) -> None:
    net, folder, result = whole
    again = run(net, folder)
    assert again["resumed"] and {k for k in result if again[k] != result[k]} <= {
        "resumed",
        "seconds",
    }


def _noisy() -> Any:
    inner = network()
    hidden = keras.layers.Dropout(0.3, name="noise")(inner.get_layer("hidden").output)
    net = keras.Model(inner.inputs[0], inner.get_layer("head")(hidden), name="net")
    net.compile("adam", "sparse_categorical_crossentropy")
    return net


def _task(data: Data, model: Any = network) -> Task:
    return Task(name="t", model=model, data=lambda: data, framework="keras")


def test_training_continues_from_a_checkpoint_as_without_a_stop(tmp_path: Path) -> None:
    split = Split(*pairs(100, 0))
    data = Data(split, split, split)
    runner = kk.keras.runner_for(_task(data, _noisy), data, seed=0)
    fresh = runner.fresh()
    phase = Phase(
        stage="p",
        epochs=2,
        learning_rate=0.01,
        clip=kk.clip.ByGlobalNorm(1.0),
        sparsity=0.5,
    )
    with kk.record.Recorder(tmp_path / "a.jsonl") as recorder:
        straight = runner.train(fresh, phase)
        straight.run_epoch(recorder)
        arrays, facts = straight.checkpoint()
        stopped = runner.train(fresh, phase)
        stopped.restore(arrays, json.loads(json.dumps(facts)))
        straight.run_epoch(recorder)
        stopped.run_epoch(recorder)
    rows = [row["loss"] for row in kk.record.read(tmp_path / "a.jsonl") if row["event"] == "step"]
    assert rows[1] == pytest.approx(rows[2], abs=1e-5) != pytest.approx(rows[0], abs=1e-5)
    for name, array in straight.arrays().items():
        assert np.allclose(array, stopped.arrays()[name], atol=1e-6), name
    masks = straight.masks()
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    assert zeros == round(0.5 * sum(mask.size for mask in masks.values()))
    assert all(not straight.arrays()[name][~mask].any() for name, mask in masks.items())


def test_shared_weights_stay_shared_and_learn(tmp_path: Path) -> None:
    split = Split(*pairs(100, 0))
    data = Data(split, split, split)
    runner = kk.keras.runner_for(_task(data), data, seed=0)
    fresh, (name,) = runner.fresh(), [n for n in runner.prunable() if "hidden" in n]
    from karikomi.search.candidates import shared_weights

    coded = shared_weights(fresh, [name], 4)
    training = runner.train(fresh, Phase(stage="q", epochs=1, learning_rate=0.05, coded=coded))
    assert isinstance(training, KerasTraining)
    with kk.record.Recorder(tmp_path / "a.jsonl") as recorder:
        training.run_epoch(recorder)
    tuned = training.coded()[name]
    model = training._model
    del training
    again = runner.train(fresh, Phase(stage="q", epochs=1, learning_rate=0.05, coded=coded))
    assert again._model is model and again._optimizer.steps == 0, "what is compiled is used again"
    training = again
    with kk.record.Recorder(tmp_path / "b.jsonl") as recorder:
        training.run_epoch(recorder)
    assert np.array_equal(training.coded()[name].grid.numbers, tuned.grid.numbers)
    assert np.array_equal(tuned.codes, coded[name].codes)
    assert not np.array_equal(tuned.grid.numbers, coded[name].grid.numbers)
    assert np.array_equal(tuned.decode(), training.arrays()[name])
    assert not tuned.decode()[coded[name].codes == 0].any()


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("probabilities", [True, False])
def test_the_distilled_loss_is_that_of_hinton(sparse: bool, probabilities: bool) -> None:
    generator = np.random.default_rng(0)
    raw, taught = generator.normal(size=(2, 5, 4, 3)).astype(np.float32)
    labels = generator.integers(0, 3, (5, 4))
    given = [_softmax(logits) if probabilities else logits for logits in (raw, taught)]
    kind = (
        keras.losses.SparseCategoricalCrossentropy
        if sparse
        else keras.losses.CategoricalCrossentropy
    )
    loss = kind(from_logits=not probabilities)
    assert can_distil(loss) and not can_distil(keras.losses.MeanSquaredError())
    targets = labels if sparse else np.eye(3)[labels]
    distilled = DistilledLoss(loss, 0.25, 3.0, probabilities=probabilities)
    found = float(distilled(joined(given[1], targets), given[0]))
    own = -np.log(np.take_along_axis(_softmax(raw), labels[..., None], -1)).mean()
    wanted, soft = _softmax(taught / 3.0), _softmax(raw / 3.0)
    apart = (wanted * np.log(wanted / soft)).sum(-1).mean()
    assert found == pytest.approx(0.75 * own + 0.25 * 9.0 * apart, rel=1e-4)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_recovery_goes_to_the_outputs_of_the_dense_model(tmp_path: Path) -> None:
    """The labels are of no use here; masks hold while the dense model is imitated."""
    inputs, _ = pairs(400, 0)
    split = Split(inputs, np.random.default_rng(1).integers(0, 3, 400))
    data = Data(split, split, split)
    task = replace(_task(data), recipe=Recipe(batch_size=50, distill=1.0))
    runner = kk.keras.runner_for(task, data, seed=0)
    dense = runner.fresh()
    (name,) = [n for n in runner.prunable() if "hidden" in n]
    masks = {name: np.abs(dense[name]) > 0.005}
    phase = Phase(stage="r", epochs=6, learning_rate=0.02, masks=masks, teacher=dense)
    start = {
        n: array + 0.5 * np.random.default_rng(2).normal(size=array.shape)
        for n, array in dense.items()
    }
    training = runner.train({n: array.astype(np.float32) for n, array in start.items()}, phase)
    with kk.record.Recorder(tmp_path / "a.jsonl") as recorder:
        for _ in range(phase.epochs):
            training.run_epoch(recorder)
    losses = [row["loss"] for row in kk.record.read(tmp_path / "a.jsonl") if row["event"] == "step"]
    assert losses[-1] < 0.3 * losses[0]
    assert not training.arrays()[name][~masks[name]].any()
    taught = runner.outputs(dense, inputs).argmax(1)
    assert (runner.outputs(training.arrays(), inputs).argmax(1) == taught).mean() > 0.9


class Several(keras.utils.PyDataset):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.targets = pairs(12, 0)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, place: int) -> Any:
        rows = slice(4 * place, 4 * place + 4)
        return self.inputs[rows], self.targets[rows]


def _generator() -> Any:
    inputs, targets = pairs(12, 0)
    for k in range(0, 12, 5):
        yield inputs[k : k + 5], targets[k : k + 5, None]


FORMS = {
    "arrays": lambda: pairs(12, 0),
    "with_none": lambda: (*pairs(12, 0), None),
    "dataset": Several,
    "generator": _generator,
    "batches": lambda: [pairs(12, 0)],
    "tuple_of_batches": lambda: (pairs(12, 0),),
    "tensors": lambda: [[keras.ops.convert_to_tensor(a) for a in pairs(12, 0)]],
}


@pytest.mark.parametrize("form", sampled(FORMS, "forms", most=2))
def test_data_as_fit_takes_them(form: str) -> None:
    found, targets = examples(network(), FORMS[form](), where="validation")
    wanted, classes = pairs(12, 0)
    assert np.array_equal(found, wanted) and np.array_equal(targets, classes)


def test_inputs_alone_have_no_targets() -> None:
    assert examples(network(), pairs(12, 0)[0], where="x")[1] is None
    assert examples(network(), [pairs(12, 0)[0]], where="x")[1] is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lambda: [], "no batch"),
        (lambda: (*pairs(4, 0), np.ones(4)), "weights of examples"),
        (lambda: [(pairs(4, 0)[0], {"a": 1, "b": 2})], "several targets"),
        (lambda: ([pairs(4, 0)[0]] * 2, pairs(4, 0)[1]), "another number of inputs"),
    ],
)
def test_other_data_are_refused(data: Any, said: str) -> None:
    with pytest.raises(KarikomiError, match=said):
        examples(network(), data(), where="validation")


def _compiled(loss: Any, metrics: Any, units: int) -> Any:
    net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(units)])
    net.compile("adam", loss, metrics=metrics)
    return net


@pytest.mark.parametrize(
    ("loss", "metrics", "shapes", "metric", "goal"),
    [
        ("sparse_categorical_crossentropy", ["accuracy"], ((4, 3), (4,)), "accuracy", "max"),
        ("sparse_categorical_crossentropy", None, ((4, 3), (4,)), "accuracy", "max"),
        ("categorical_crossentropy", ["acc"], ((4, 3), (4, 3)), categorical_accuracy, "max"),
        (keras.losses.BinaryCrossentropy(), None, ((4, 1), (4,)), binary_accuracy, "max"),
        (
            "mse",
            [keras.metrics.MeanAbsoluteError()],
            ((4, 3), (4, 3)),
            "mean_absolute_error",
            "min",
        ),
        ("mse", None, ((4, 3), (4, 3)), "mean_squared_error", "min"),
    ],
)
def test_the_metric_is_that_of_compile(
    loss: Any, metrics: Any, shapes: Any, metric: Any, goal: str
) -> None:
    found = compiled_of(_compiled(loss, metrics, 3), *map(np.zeros, shapes))
    assert (found.metric, found.goal, found.class_axis) == (metric, goal, -1)
    assert isinstance(found.loss, keras.losses.Loss) or callable(found.loss)


def test_a_metric_without_a_numpy_form_is_refused() -> None:
    net = _compiled("mse", [keras.metrics.AUC()], 1)
    with pytest.raises(InvalidArgument, match="no NumPy form.*auc"):
        compiled_of(net, np.zeros((4, 1)), np.zeros(4))


class Own(keras.Model):
    """A subclass without get_config."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = keras.layers.Dense(width)

    def call(self, inputs: Any) -> Any:
        return self.inner(inputs)


def test_a_subclass_without_a_configuration_is_refused() -> None:
    net = Own(3)
    with pytest.raises(InvalidArgument, match="no variables yet"):
        copies_of(net)
    net(np.zeros((1, 6), np.float32))
    with pytest.raises(Unsupported, match="give it get_config"):
        copies_of(net)


def test_copies_have_weights_of_their_own() -> None:
    net = network()
    other = copies_of(net)()
    other.get_layer("hidden").kernel.assign(np.zeros((6, 40)))
    assert np.any(net.get_layer("hidden").get_weights()[0]) and not other.compiled
