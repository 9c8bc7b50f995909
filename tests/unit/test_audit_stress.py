"""Corruptions and attacks: laws of each corruption, and bounds of each attack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from karikomi import registry
from karikomi.audit.attacks import attacked
from karikomi.audit.corruptions import corruptions_of, modality_of
from karikomi.audit.corruptions.corruption import MODALITIES, SEVERITIES
from karikomi.audit.stress import corrupted, under_corruptions
from karikomi.errors import InvalidArgument
from karikomi.tasks import Data, Split, Task


def inputs_of(modality: str, count: int = 40) -> np.ndarray:
    generator = np.random.default_rng(0)
    if modality == "tokens":
        return generator.integers(0, 50, (count, 30))
    if modality == "signal":
        return np.cumsum(generator.normal(size=(count, 60)), 1).astype(np.float32)
    places = np.linspace(0, 3, 16)
    waves = np.sin(places[:, None] + places + generator.uniform(0, 6, (count, 3, 1, 1)))
    return (2.5 * waves + 0.7).astype(np.float32)


EVERY = [(modality, name) for modality in MODALITIES for name in corruptions_of(modality)]


def test_there_are_ten_for_images_and_some_for_others() -> None:
    assert [len(corruptions_of(modality)) for modality in MODALITIES] == [10, 3, 4]
    with pytest.raises(InvalidArgument, match="unknown modality"):
        corruptions_of("video")
    assert all(entry.formula and entry.source for entry in registry.entries("corruption"))


@pytest.mark.parametrize(("modality", "name"), EVERY)
def test_laws_of_a_corruption(modality: str, name: str) -> None:
    """Same shape and type, from the seed alone, inside of the range for images, and stronger by severity."""
    corruption, inputs = corruptions_of(modality)[name], inputs_of(modality)
    kept = inputs.copy()
    made = [corrupted(corruption, inputs, s, modality, seed=[3, 1]) for s in SEVERITIES]
    again = corrupted(corruption, inputs, 3, modality, seed=[3, 1])
    np.testing.assert_array_equal(inputs, kept)
    np.testing.assert_array_equal(made[2], again)
    distances = []
    for out in made:
        assert out.shape == inputs.shape and out.dtype == inputs.dtype
        assert np.isfinite(out).all()
        if modality == "image":
            assert out.min() >= inputs.min() - 1e-4 and out.max() <= inputs.max() + 1e-4
        if modality == "tokens":
            assert np.isin(out, inputs).all()
        difference = out != inputs if modality == "tokens" else np.abs(out - inputs)
        distances.append(float(np.mean(difference)))
    assert distances[0] > 0
    assert all(
        after >= before * 0.999 for before, after in zip(distances, distances[1:], strict=False)
    )


def test_channels_first_and_last_are_corrupted_alike() -> None:
    first = inputs_of("image")
    last = np.ascontiguousarray(np.moveaxis(first, 1, 3))
    for name, corruption in corruptions_of("image").items():
        made = [corrupted(corruption, x, 4, "image", seed=5) for x in (first, last)]
        np.testing.assert_allclose(np.moveaxis(made[0], 1, 3), made[1], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "pixelate"])
def test_rows_and_columns_are_corrupted_alike(name: str) -> None:
    images = inputs_of("image") * np.linspace(0.2, 1.0, 16, dtype=np.float32)
    turned = np.ascontiguousarray(np.swapaxes(images, 2, 3))
    made = [
        corrupted(corruptions_of("image")[name], x, 4, "image", seed=5) for x in (images, turned)
    ]
    np.testing.assert_allclose(np.swapaxes(made[1], 2, 3), made[0], atol=1e-5)
    assert np.abs(made[0] - images).mean() > 1e-3


def test_what_inputs_look_like() -> None:
    assert modality_of(np.zeros((2, 1, 8, 8))) == modality_of(np.zeros((2, 8, 8, 3))) == "image"
    assert modality_of(np.zeros((2, 5, 8, 8))) == "signal"
    assert modality_of(np.zeros((2, 8), np.int64)) == "tokens"
    assert modality_of(np.zeros(8)) is modality_of({"x": np.zeros((2, 8))}) is None
    assert modality_of(np.zeros((2, 8), bool)) is None


class Linear:
    """``inputs @ weight.T`` with cross-entropy; `bent` loses its way where the inputs have little spread."""

    def outputs(self, arrays: Any, inputs: np.ndarray) -> np.ndarray:
        flat = inputs.reshape(len(inputs), -1)
        out = flat @ arrays["weight"].T
        if "bent" in arrays:
            faint = flat.std(axis=1, keepdims=True) < arrays["bent"]
            out = np.where(faint, -out, out)
        return out

    def input_gradients(self, arrays: Any, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        out = self.outputs(arrays, inputs)
        shares = np.exp(out - out.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        shares[np.arange(len(targets)), targets] -= 1
        return (shares @ arrays["weight"]).reshape(inputs.shape).astype(np.float32)


def problem() -> tuple[Task, Split, dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(4, 48)).astype(np.float32)
    inputs = generator.normal(size=(600, 3, 4, 4)).astype(np.float32)
    split = Split(inputs, (inputs.reshape(600, -1) @ weight.T).argmax(1))
    task = Task(name="t", model=dict, data=lambda: Data(split, split, split))
    return task, split, {"weight": weight}


def test_what_is_lost_on_clean_inputs_is_not_put_down_to_corruptions() -> None:
    task, split, arrays = problem()
    runner: Any = Linear()
    found = under_corruptions(task, runner, (arrays, {"weight": -arrays["weight"]}), split, seed=0)
    assert found is not None
    assert all(row["drop"] > 0.2 and row["p"] > 0.05 for row in found["rows"])


def test_the_corruption_that_hurts_one_network_only_is_told() -> None:
    task, split, arrays = problem()
    runner: Any = Linear()
    bent = {**arrays, "bent": np.float32(0.2)}
    found = under_corruptions(task, runner, (arrays, bent), split, seed=0)
    assert found is not None and found["modality"] == "image" and found["examples"] == 600
    rows = {row["corruption"]: row for row in found["rows"]}
    named = {name for name, row in rows.items() if row["p"] < 0.01 and row["drop"] > 0.02}
    assert named == {"contrast"}
    assert rows["contrast"]["before"][4] > rows["contrast"]["after"][4] + 0.1
    both = under_corruptions(task, runner, (arrays, arrays), split, seed=0)
    assert both is not None and all(row["drop"] == 0 and row["p"] == 1.0 for row in both["rows"])
    assert all(row["relative"] == 1.0 for row in both["rows"])


def test_attacks_stay_in_their_ball_and_hurt() -> None:
    task, split, arrays = problem()
    seen: list[np.ndarray] = []

    class Watched(Linear):
        def outputs(self, arrays: Any, inputs: np.ndarray) -> np.ndarray:
            seen.append(inputs)
            return super().outputs(arrays, inputs)

    runner: Any = Watched()
    found = attacked(task, runner, (arrays, {"weight": 2 * arrays["weight"]}), split, seed=0)
    assert found is not None and found["before"] < found["clean_before"] - 0.02
    assert found["worst"] == min(found["after"], found["transfer"])
    low, high = (f(split.inputs, axis=(0, 2, 3), keepdims=True) for f in (np.min, np.max))
    for given in seen:
        if len(given) == found["examples"]:
            moved = np.abs(given - split.inputs[: len(given)])
            assert (moved <= found["epsilon"] * (high - low) * 1.0001 + 1e-6).all()
            assert (given >= low).all() and (given <= high).all()
    assert (
        attacked(
            task, runner, (arrays, arrays), Split(np.zeros((4, 9), int), np.zeros(4, int)), seed=0
        )
        is None
    )
