"""The audit: laws of its figures, planted damage that it must name, and what it must not invent."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from karikomi import report
from karikomi.audit import audit
from karikomi.audit.alarms import alarms
from karikomi.audit.predictions import LISTED, Predictions
from karikomi.errors import InvalidArgument
from karikomi.tasks import Arrays, Data, Split, Task


class Linear:
    """A runner without a framework: ``inputs @ weight.T``, and cross-entropy as its loss."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def outputs(self, arrays: Arrays, inputs: np.ndarray) -> np.ndarray:
        return inputs @ arrays["weight"].T

    def fresh(self) -> Arrays:
        return {"weight": np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)}

    def layer_outputs(self, arrays: Arrays, inputs: np.ndarray) -> dict[str, np.ndarray]:
        return {"linear": self.outputs(arrays, inputs)}

    def input_gradients(
        self, arrays: Arrays, inputs: np.ndarray, targets: np.ndarray
    ) -> np.ndarray:
        outputs = self.outputs(arrays, inputs)
        shares = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        shares[np.arange(len(targets)), targets] -= 1
        return (self.scale * shares @ arrays["weight"]).astype(np.float32)


def _blobs(classes: int, *, per_class: int = 40, spread: float = 0.25) -> tuple[Data, Arrays]:
    """Return data around the corners of a simplex, and the weights that classify it."""
    generator = np.random.default_rng(classes)
    targets = np.repeat(np.arange(classes), per_class)
    corners = np.eye(classes, 8, dtype=np.float32)
    noise = generator.standard_normal((len(targets), 8), dtype=np.float32)
    split = Split(corners[targets] + np.float32(spread) * noise, targets)
    return Data(split, split, split), {"weight": 4 * corners}


def _task(data: Data, **changes: Any) -> Task:
    return Task(name="blobs", model=lambda: None, data=lambda: data, **changes)


def _audit(data: Data, before: Arrays, after: Arrays, *, seed: int = 0) -> dict[str, Any]:
    return audit(_task(data), before, after, seed=seed, runner=Linear())  # type: ignore[arg-type]


def test_a_network_agrees_with_itself() -> None:
    data, arrays = _blobs(4)
    result = _audit(data, arrays, arrays)
    assert (result["agreement"], result["changed"], result["changed_examples"]) == (1.0, 0, [])
    assert all(row["before"] == row["after"] for row in result["noise"])
    assert result["gradient_agreement"]["mean_cosine"] == pytest.approx(1.0)
    assert result["gradient_agreement"]["share_above_0.9"] == 1.0
    assert result["warnings"] == []


@pytest.mark.parametrize("classes", [2, 3, 8])
def test_a_dead_output_unit_is_named(classes: int) -> None:
    data, arrays = _blobs(classes)
    for unit in range(classes):
        hurt = {"weight": arrays["weight"].copy()}
        hurt["weight"][unit] = 0
        result = _audit(data, arrays, hurt)
        named = [text for text in result["warnings"] if text.startswith("class ")]
        assert len(named) == 1 and named[0].startswith(f"class {unit} lost "), named
        lost = result["classes"][unit]
        points = 100 * (lost["before"] - lost["after"])
        assert f"lost {points:.1f} points" in named[0] and "of 40 examples" in named[0]


def test_a_dead_output_unit_of_a_trained_network_is_named() -> None:
    pytest.importorskip("torch")
    from karikomi import registry
    from karikomi.record import Recorder
    from karikomi.tasks import Phase, load

    class Silent(Recorder):
        def __init__(self) -> None:
            self._silent = True

    task = load("digits")
    data = task.data()
    runner = registry.framework("torch").runner_for(task, data, seed=0)
    training = runner.train(runner.fresh(), Phase(stage="train", epochs=6, learning_rate=4e-3))
    for _ in range(6):
        training.run_epoch(Silent())
    before = training.arrays()
    after = {name: array.copy() for name, array in before.items()}
    after["fc3.weight"][7] = 0
    result = audit(task, before, after)
    assert [text[:12] for text in result["warnings"] if text.startswith("class")] == [
        "class 7 lost"
    ]
    assert audit(task, before, before)["warnings"] == []
    with pytest.raises(InvalidArgument, match="fc3"):
        audit(task, before, {name: a for name, a in after.items() if name != "fc3.weight"})


def test_damage_of_all_classes_alike_names_none() -> None:
    even = [{"class": str(c), "examples": 50, "before": 0.9, "after": 0.6} for c in range(10)]
    assert alarms({"classes": even}) == []


@pytest.mark.parametrize(
    ("examples", "before", "after", "named"),
    [(100, 0.9, 0.87, True), (100, 0.9, 0.88, False), (1000, 0.9, 0.895, False)],
)
def test_a_small_loss_of_a_class_is_chance(
    examples: int, before: float, after: float, named: bool
) -> None:
    """More than two examples and at least a point, however calm the other classes are."""
    classes = [
        {"class": "a", "examples": examples, "before": before, "after": after},
        {"class": "b", "examples": examples, "before": 1.0, "after": 1.0},
    ]
    assert bool(alarms({"classes": classes})) is named


_labels = st.integers(1, 60).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n)] * 3)
)


@given(_labels)
def test_predictions_add_up(labels: tuple[list[int], list[int], list[int]]) -> None:
    targets, before, after = map(np.array, labels)
    facts = Predictions(targets, before, after).facts()
    n = len(targets)
    assert sum(one["examples"] for one in facts["classes"]) == n
    for key, said in (("before", before), ("after", after)):
        right = sum(one["examples"] * one[key] for one in facts["classes"])
        assert right == pytest.approx(np.sum(said == targets))
    assert facts["lost"] - facts["gained"] == np.sum(before == targets) - np.sum(after == targets)
    assert facts["agreement"] == pytest.approx(1 - facts["changed"] / n)
    assert len(facts["changed_examples"]) == min(facts["changed"], LISTED)
    kinds = [
        0 if one["label"] == one["before"] else 1 if one["label"] == one["after"] else 2
        for one in facts["changed_examples"]
    ]
    assert kinds == sorted(kinds)
    assert kinds.count(0) == min(facts["lost"], LISTED)


@settings(max_examples=6)
@given(st.integers(0, 2**31))
def test_swapping_the_two_swaps_the_figures(seed: int) -> None:
    data, arrays = _blobs(5)
    other = {"weight": arrays["weight"] + np.random.default_rng(seed).normal(size=(5, 8))}
    there, back = _audit(data, arrays, other), _audit(data, other, arrays)
    assert (there["lost"], there["gained"]) == (back["gained"], back["lost"])
    assert there["metric_before"] == back["metric_after"]
    assert [row["before"] for row in there["noise"]] == [row["after"] for row in back["noise"]]
    for key in ("mean_cosine", "median_cosine"):
        assert there["gradient_agreement"][key] == pytest.approx(back["gradient_agreement"][key])


def test_noise_is_the_same_for_both_and_follows_the_seed() -> None:
    data, arrays = _blobs(4, spread=0.5)
    first, again, other = (_audit(data, arrays, arrays, seed=seed)["noise"] for seed in (0, 0, 1))
    assert [row["sigma"] for row in first] == [0.0, 0.1, 0.2, 0.4]
    assert first == again
    assert first != other
    clean = _audit(data, arrays, arrays)
    assert first[0]["before"] == clean["metric_before"]
    assert first[3]["before"] < first[0]["before"]


class Steps(Linear):
    """Outputs of shape (n, classes, steps), which `arrays` are."""

    def outputs(self, arrays: Arrays, inputs: np.ndarray) -> np.ndarray:
        return arrays["outputs"]

    def input_gradients(self, arrays: Arrays, inputs: Any, targets: Any) -> np.ndarray:
        return np.ones_like(inputs)


def test_the_audit_has_the_classes_and_targets_of_the_metric() -> None:
    targets = np.array([[0, 1, -100], [1, -100, 1]])
    before = np.eye(2)[np.array([[0, 1, 1], [1, 0, 1]])].transpose(0, 2, 1)
    after = np.eye(2)[np.array([[0, 0, 0], [1, 1, 1]])].transpose(0, 2, 1)
    split = Split(np.zeros((2, 1), np.float32), targets)
    data, runner = Data(split, split, split), Steps()
    pair = ({"outputs": before}, {"outputs": after})
    result = audit(_task(data), *pair, runner=runner)  # type: ignore[arg-type]
    assert (result["metric_before"], result["metric_after"]) == (1.0, 3 / 4)
    assert (result["changed"], result["lost"], result["agreement"]) == (1, 1, 3 / 4)
    assert [(row["class"], row["examples"]) for row in result["classes"]] == [("0", 1), ("1", 3)]
    assert result["changed_examples"] == [{"index": 1, "label": "1", "before": "1", "after": "0"}]
    last = [{"outputs": item["outputs"].transpose(0, 2, 1)} for item in pair]
    swapped = audit(_task(data, class_axis=-1), *last, runner=runner)  # type: ignore[arg-type]
    assert {**swapped, "metric_before": 1.0} == result


def test_zero_gradients_are_counted_and_not_averaged() -> None:
    data, arrays = _blobs(3)
    dead = {"weight": np.zeros_like(arrays["weight"])}
    result = _audit(data, arrays, dead)
    found = result["gradient_agreement"]
    assert found["zero_gradients"] == found["examples"] == 120
    assert (found["mean_cosine"], found["share_above_0.9"]) == (None, None)
    assert any(
        "120 of 120 examples have no gradient cosine (120 zero" in w for w in result["warnings"]
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_tiny_gradients_still_have_a_direction() -> None:
    data, arrays = _blobs(3)
    runner: Any = Linear(scale=1e-36)
    found = audit(_task(data), arrays, arrays, runner=runner)["gradient_agreement"]
    assert found["zero_gradients"] == 0
    assert found["mean_cosine"] == pytest.approx(1.0)


def test_opposite_gradients_are_said() -> None:
    data, arrays = _blobs(2)
    result = _audit(data, arrays, {"weight": -arrays["weight"]})
    assert result["gradient_agreement"]["median_cosine"] < -0.9
    assert any(
        text.startswith("the input gradients differ in direction") for text in result["warnings"]
    )


def test_only_so_many_gradients_are_taken() -> None:
    data, arrays = _blobs(4, per_class=200)
    assert _audit(data, arrays, arrays)["gradient_agreement"]["examples"] == 512


def test_another_metric_has_no_classes_and_says_so() -> None:
    data, arrays = _blobs(3)

    def closeness(outputs: np.ndarray, targets: np.ndarray) -> float:
        return -float(np.mean(np.square(outputs)))

    runner: Any = Linear()
    result = audit(_task(data, metric=closeness), arrays, arrays, runner=runner)
    assert (result["metric"], result["classes"]) == ("closeness", [])
    assert (result["agreement"], result["changed"]) == (None, None)
    assert "the metric is closeness" in result["not_checked"]["classes"]
    assert "closeness" in report.audit_table(result)


def test_inputs_that_are_no_floats_get_no_noise() -> None:
    data, arrays = _blobs(3)
    whole = dataclasses.replace(data.test, inputs=np.rint(data.test.inputs * 100).astype(np.int64))
    result = _audit(dataclasses.replace(data, test=whole), arrays, arrays)
    assert (result["noise"], result["gradient_agreement"]) == ([], None)
    assert "not floats" in result["not_checked"]["noise"]


def test_non_finite_outputs_are_said_and_json_stays_json() -> None:
    data, arrays = _blobs(3)
    bad = {"weight": arrays["weight"].copy()}
    bad["weight"][1, 0] = np.nan
    with np.errstate(invalid="ignore"):
        result = _audit(data, arrays, bad)
    assert result["nonfinite"] == [0, 120]
    assert "after has non-finite outputs for 120 examples" in result["warnings"]
    assert result["gradient_agreement"]["nonfinite_gradients"] == 120
    json.dumps(result, allow_nan=False)


def test_a_fall_under_noise_is_said() -> None:
    noise = [
        {"sigma": 0.0, "before": 0.95, "after": 0.94},
        {"sigma": 0.2, "before": 0.93, "after": 0.83},
    ]
    facts = {"metric": "accuracy", "metric_before": 0.95, "metric_after": 0.94, "noise": noise}
    assert alarms(facts) == [
        "under noise of 0.2 standard deviations the drop is 10.0 points (without noise 1.0)"
    ]
    noise[1]["after"] = 0.915
    assert alarms(facts) == []


def test_churn_behind_a_calm_metric_is_said() -> None:
    facts = {"metric": "accuracy", "metric_before": 0.9, "metric_after": 0.9, "agreement": 0.9}
    assert alarms(facts) == [
        "10.0 % of the predictions changed, although the accuracy moved by 0.0 points only"
    ]
    assert alarms({**facts, "agreement": 0.97}) == []
    assert alarms({**facts, "metric_after": 0.8}) == []


def test_the_report_takes_the_result() -> None:
    data, arrays = _blobs(3)
    result = _audit(data, arrays, {"weight": arrays["weight"][::-1].copy()})
    assert "Under noise" in report.audit_page(result)
    assert "warning:" in report.audit_table(result)


@pytest.mark.parametrize("seed", [-1, 1.5, True])
def test_a_bad_seed_is_refused(seed: Any) -> None:
    data, arrays = _blobs(2)
    with pytest.raises(InvalidArgument, match="seed"):
        _audit(data, arrays, arrays, seed=seed)
