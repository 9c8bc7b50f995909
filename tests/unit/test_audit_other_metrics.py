"""The audit beyond plain classes: slices and drops of any metric, targets in sequences, costs, favoured classes."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from audited import IMAGES, REGRESSION, TEXT, Linear
from karikomi import report
from karikomi.audit import audit
from karikomi.audit.alarms import alarms
from karikomi.audit.corruptions import corruptions_of, modality_of
from karikomi.audit.corruptions.disturbed_input import disturbed_input
from karikomi.audit.gates import gate_of, judged
from karikomi.audit.paired.slices import mean_rows
from karikomi.audit.stress import corrupted
from karikomi.tasks import Data, Split, Task


def _regression(bad: slice, by: float) -> dict[str, Any]:
    """Return the audit of a network of which some outputs moved, by way of an input that only these examples have."""
    generator = np.random.default_rng(0)
    x = np.zeros((200, 4), np.float32)
    x[:, :3] = generator.normal(size=(200, 3))
    x[bad, 3] = 1.0
    weight = np.array([[1.0, -1.0, 0.5, 0.0]], np.float32)
    targets = x @ weight.T + 0.1 * generator.normal(size=(200, 1)).astype(np.float32)
    data = Data(*(Split(x, targets) for _ in range(3)))
    task = dataclasses.replace(REGRESSION.task, data=lambda: data)
    moved = {"head.weight": weight + np.array([[0, 0, 0, by]], np.float32)}
    slices = {"marked": x[:, 3] > 0, "others": x[:, 3] == 0}
    runner: Any = Linear((1, 4), "mean_squared_error")
    return audit(task, {"head.weight": weight}, moved, runner=runner, slices=slices)


def test_a_slice_of_a_regression_is_named() -> None:
    found = _regression(slice(0, 25), 1.0)
    marked, others = found["slices"]
    assert (marked["examples"], others["lost"], others["drop"]) == (25, 0, 0.0)
    assert marked["drop"] == pytest.approx(marked["after"] - marked["before"])
    assert any(text.startswith("slice marked got worse by 1.0") for text in found["warnings"])
    assert any(text.startswith("the mean_squared_error gets worse") for text in found["warnings"])
    assert not any(text.startswith("slice others") for text in found["warnings"])
    outcomes = [judged(gate_of(f"slice_drop>{limit}"), found).outcome for limit in (0.5, 5.0)]
    assert outcomes == ["missed", "held"]
    page = report.audit_page(found)
    assert "marked" in page and "drop it takes" in page


def test_a_network_that_stays_has_no_drop() -> None:
    found = _regression(slice(0, 25), 0.0)
    assert found["warnings"] == [] and all(row["p"] > 0.01 for row in found["slices"])


def test_the_test_of_means_keeps_its_level() -> None:
    generator, named = np.random.default_rng(5), 0
    for _ in range(300):
        worse = generator.standard_t(5, size=120)
        groups = {str(k): np.arange(40 * k, 40 * k + 40) for k in range(3)}
        named += any(row["named"] for row in mean_rows(worse, (worse, worse), groups, alpha=0.05))
    assert named <= 27  # of 15 expected


def test_error_interval_and_least_drop_of_a_mean_by_hand() -> None:
    worse = np.array([3.0, 1.0, -1.0, 5.0, 0.0, 4.0])
    slices = {"all": np.arange(6), "last": np.array([3, 5])}
    whole, last = mean_rows(worse, (np.zeros(6), worse), slices, alpha=0.05)
    error = math.sqrt(sum((x - 2.0) ** 2 for x in worse) / 5 / 6)
    assert (whole["examples"], whole["lost"], whole["gained"], whole["drop"]) == (6, 4, 1, 2.0)
    assert whole["error"] == pytest.approx(error)
    assert whole["drop_interval"] == pytest.approx([2.0 - 1.959964 * error, 2.0 + 1.959964 * error])
    assert whole["least_drop"] == pytest.approx(1.959964 * error)  # of 0.05 for one of two slices
    assert (last["drop"], last["error"]) == (4.5, pytest.approx(0.5))


def test_an_example_alone_has_no_interval() -> None:
    (row,) = mean_rows(np.array([1.0]), (np.zeros(1), np.ones(1)), {"single": np.array([0])})
    assert (row["drop_interval"], row["least_drop"], row["named"]) == (None, None, False)
    gate = judged(gate_of("slice_drop>0.5"), {"slices": [row]})
    assert gate.outcome == "undecided"


def _sequences(scale: float) -> dict[str, Any]:
    """Return the audit of a network with a class per step, of which one does not count, scaled by a number."""

    class Steps(Linear):
        def outputs(self, arrays: Any, inputs: np.ndarray) -> np.ndarray:
            return np.moveaxis(inputs @ arrays["head.weight"].T, -1, 1)

        def layer_outputs(self, arrays: Any, inputs: np.ndarray) -> dict[str, np.ndarray]:
            return {}

        def input_gradients(self, arrays: Any, inputs: np.ndarray, targets: Any) -> np.ndarray:
            return np.ones_like(inputs)

    generator = np.random.default_rng(1)
    x = generator.normal(size=(60, 5, 6)).astype(np.float32)
    weight = generator.normal(size=(3, 6)).astype(np.float32)
    noisy = x @ weight.T + generator.gumbel(size=(60, 5, 3))
    targets = noisy.argmax(-1)
    targets[:, 0] = -100
    data = Data(*(Split(x, targets) for _ in range(3)))
    task = Task(name="steps", model=dict, data=lambda: data)
    runner: Any = Steps((3, 6), "")
    small = {"head.weight": scale * weight}
    return audit(task, {"head.weight": weight}, small, runner=runner, most=20)


def test_sequences_have_a_calibration() -> None:
    found = _sequences(8.0)
    assert found["calibration"]["examples"] == 240 and "calibration" not in found["not_checked"]
    assert any(text.startswith("the probabilities say less") for text in found["warnings"])
    same = _sequences(1.0)
    assert same["calibration"]["nll_p"] == 0.5 and same["warnings"] == []


def _rows(*rows: tuple[str, int, float, float, list[int], float]) -> dict[str, Any]:
    keys = ("class", "examples", "before", "after", "predicted", "predicted_p")
    return {"classes": [dict(zip(keys, row, strict=True)) for row in rows]}


def test_a_favoured_class_is_named_where_all_others_pay() -> None:
    paid = [(name, 100, 1.0, 0.9, [100, 90], 1.0) for name in "abcd"]
    found = alarms(_rows(*paid, ("e", 100, 1.0, 1.0, [100, 140], 1e-9)))
    assert found == ["class e is predicted for 140 of 500 examples, before for 100 (100 are of it)"]
    assert alarms(_rows(*paid, ("e", 100, 1.0, 1.0, [100, 140], 0.2))) == []


def test_classes_that_change_places_are_named() -> None:
    result = IMAGES.result()
    swapped = {"head.weight": IMAGES.before["head.weight"][[1, 0, 2, 3, 4, 5]]}
    runner: Any = Linear(swapped["head.weight"].shape, "cross_entropy")
    found = audit(IMAGES.task, IMAGES.before, swapped, runner=runner, most=40)
    said = [text for text in found["warnings"] if text.startswith("class")]
    assert len(said) == 2 and "of them to class 1" in said[0] and "of them to class 0" in said[1]
    assert result["classes"][0]["predicted"][0] == result["classes"][0]["examples"]


def test_no_layer_is_to_blame_for_what_may_be_chance() -> None:
    layers = [{"layer": "a", "cka": 1.0, "alone": 0.33}, {"layer": "b", "cka": 1.0, "alone": 0.0}]
    facts = {"metric": "accuracy", "drop": 0.0, "layers": layers}
    unsure = {"drop": 0.0, "drop_interval": [-0.7, 0.7], "negative_flips": 0.3}
    assert alarms({**facts, "outcomes": unsure}) == []
    assert len(alarms(facts)) == 1


def test_the_reasons_are_those_of_the_data() -> None:
    assert "int" in TEXT.result()["not_checked"]["attack"]
    assert "mean_squared_error" in REGRESSION.result()["not_checked"]["calibration"]
    assert IMAGES.result()["not_checked"] == {}


def test_memory_is_among_the_costs() -> None:
    result = IMAGES.result()
    assert result["costs"]["memory"] == [64_000, 64_000]
    assert "64.0 kB" in report.audit_page(result)


class Masked(Linear):
    """The runner of tokens in a mapping beside a mask, which it multiplies with."""

    def outputs(self, arrays: Any, inputs: Any) -> np.ndarray:
        kept = np.where(inputs["attention_mask"] > 0, inputs["input_ids"], 0)
        return super().outputs(arrays, kept)


def test_tokens_beside_a_mask_are_corrupted_and_explained() -> None:
    ids = np.asarray(TEXT.task.data().test.inputs)
    mask = np.ones_like(ids)
    mask[:, -4:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    targets = Masked((3, 140), "").outputs(TEXT.before, inputs).argmax(1)
    data = Data(*(Split(inputs, targets) for _ in range(3)))
    task = dataclasses.replace(TEXT.task, data=lambda: data)
    runner: Any = Masked((3, 140), "")
    found = audit(task, TEXT.before, TEXT.after, runner=runner, most=40)
    assert found["corruptions"]["modality"] == "tokens"
    assert found["explanation"]["method"] == "occlusion"
    # What the mask hides counts in neither network.
    shown = found["explanation"]["shown"][0]
    assert not np.any(np.array([shown["before"], shown["after"]])[:, -3:])
    assert np.any(shown["before"]) and len(shown["words"]) == 14
    assert set(found["not_checked"]) == {"slices", "noise", "gradient_agreement", "attack"}
    assert found["not_checked"]["attack"] == "the inputs are 2 arrays"


def test_a_regression_that_ends_in_nan_is_said_to() -> None:
    lost = {"head.weight": np.full_like(REGRESSION.before["head.weight"], np.nan)}
    runner: Any = Linear(lost["head.weight"].shape, "mean_squared_error")
    found = audit(REGRESSION.task, REGRESSION.before, lost, runner=runner, population=2)
    assert (found["metric_after"], found["drop"], found["attack"]) == (None, None, None)
    assert "after has non-finite outputs for 300 examples" in found["warnings"]
    assert found["not_checked"]["attack"] == "the metric is not finite"
    json.dumps(found, allow_nan=False)
    assert "non-finite outputs for 300" in report.audit_page(found) + report.audit_table(found)


def test_two_arrays_of_floats_leave_open_which_is_corrupted() -> None:
    x = np.random.default_rng(0).normal(size=(4, 3))
    assert disturbed_input((x, x)) is None
    found = disturbed_input((np.ones((4, 3), int), x))
    assert found is not None and found.key == 1
    made = found.replaced(-x)
    assert np.array_equal(made[1], -x) and np.array_equal(made[0], np.ones((4, 3), int))


@pytest.mark.parametrize("name", ["brightness", "gaussian_noise"])
def test_images_of_bytes_are_corrupted_as_those_of_floats(name: str) -> None:
    whole = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    whole[0, :, 0, 0], whole[0, :, 0, 1] = 0, 255
    corruption = corruptions_of("image")[name]
    assert modality_of(whole) == "image"
    made = corrupted(corruption, whole, 3, "image", seed=[0])
    floats = corrupted(corruption, whole.astype(np.float64), 3, "image", seed=[0])
    assert made.dtype == np.uint8
    assert np.abs(made.astype(float) - np.clip(floats, 0, 255)).max() <= 0.5 + 1e-9
