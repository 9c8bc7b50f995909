"""Tasks: splits that share no example, augmentation by whole pixels, metrics and digests on small known cases."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from karikomi import tasks
from karikomi.errors import InvalidArgument, KarikomiError, NonFinite
from karikomi.tasks import Data, Split, Task, mnist


def test_the_accuracy_is_the_share_of_largest_outputs() -> None:
    outputs = np.array([[1, 9, 2], [3, 1, 0], [0, 1, 8], [5, 4, 3], [-3, -1, -2]])
    targets = np.array([1, 1, 2, 2, 1])
    assert tasks.accuracy(outputs, targets) == 3 / 5
    assert task().judge(outputs, targets) == 3 / 5
    pixels = np.stack([outputs, outputs], axis=1)
    assert task().judge(pixels, np.stack([targets, 0 * targets], axis=1)) == (3 + 2) / 10


def task(**changes: Any) -> Task:
    return Task(**{"name": "t", "model": dict, "data": lambda: None, **changes})


def test_a_metric_of_the_user_is_given_outputs_then_targets() -> None:
    def bias(outputs: np.ndarray, targets: np.ndarray) -> float:
        return float(np.mean(outputs - targets))

    own = task(metric=bias)
    assert (own.metric_name, own.judge(np.array([5.0, 6.0]), np.array([1.0, 1.0]))) == ("bias", 4.5)
    assert task().metric_name == "accuracy"
    with pytest.raises(NonFinite):
        task(metric=lambda outputs, targets: np.inf).judge(np.ones(1), np.ones(1))


def splits(*sizes: int) -> list[Split]:
    return [Split(np.arange(n, dtype=np.float32), np.arange(n)) for n in sizes]


def test_the_digest_of_the_data_depends_on_each_array() -> None:
    data = Data(*splits(5, 4, 3))
    digests = {data.fingerprint()}
    for name in ("train", "validation", "test"):
        for part in ("inputs", "targets"):
            split = getattr(data, name)
            changed = getattr(split, part).copy()
            changed[-1] += 1
            other = dataclasses.replace(split, **{part: changed})
            digests.add(dataclasses.replace(data, **{name: other}).fingerprint())
    digests.add(
        dataclasses.replace(data, train=data.validation, validation=data.train).fingerprint()
    )
    wide = Split(data.test.inputs.astype(np.float64), data.test.targets)
    digests.add(dataclasses.replace(data, test=wide).fingerprint())
    assert len(digests) == 1 + 6 + 2
    assert Data(*splits(5, 4, 3)).fingerprint() in digests


def test_the_digest_of_the_code_depends_on_each_function() -> None:
    def first(*_: Any) -> float:
        return 1.0

    def second(*_: Any) -> float:
        return 2.0

    fields = ("model", "data", "loss", "metric", "augment")
    digests = {
        task(**{**dict.fromkeys(fields, first), name: second}).fingerprint() for name in fields
    }
    digests.add(task(**dict.fromkeys(fields, first)).fingerprint())
    assert len(digests) == 6


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_each_split_is_checked(name: str) -> None:
    data = Data(*splits(5, 4, 3))
    bad = Split(np.array([1.0, np.nan, 1.0]), np.arange(3))
    uneven = Split(np.ones(3), np.arange(2))
    for split, said in ((bad, "non-finite"), (uneven, "empty or uneven"), (splits(0)[0], "empty")):
        with pytest.raises(InvalidArgument, match=f"the {name} .*{said}"):
            tasks.checked_data(
                task(data=lambda split=split: dataclasses.replace(data, **{name: split}))
            )


def test_the_digits_are_split_without_overlap() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn.load_digits(return_X_y=True)
    data = tasks.load("digits").data()
    parts = (data.train, data.validation, data.test)
    assert [len(part) for part in parts] == [897, 400, 500]
    together = np.concatenate([part.inputs for part in parts])
    assert (together.min(), together.max(), together.dtype) == (-1.0, 1.0, np.float32)
    found = {
        (*row, label)
        for row, label in zip(
            8 * together + 8, np.concatenate([part.targets for part in parts]), strict=True
        )
    }
    assert found == {(*row, label) for row, label in zip(images, labels, strict=True)}
    for part in parts:
        assert len({*part.targets.tolist()}) == 10


def test_the_digits_are_jittered_by_a_tenth() -> None:
    augment = tasks.load("digits").augment
    assert augment is not None
    moved = augment(np.ones((500, 64), np.float32), np.random.default_rng(0))
    assert moved.mean() == pytest.approx(1.0, abs=0.003)
    assert moved.std() == pytest.approx(0.1, abs=0.002)


def test_a_shift_moves_by_a_pixel_at_most_in_every_direction() -> None:
    images = np.zeros((300, 1, 5, 4), np.float32)
    images[:, :, 2, 1] = 7.0
    moved = mnist._shift(images, np.random.default_rng(0))
    assert moved.shape == images.shape
    places = [tuple(np.argwhere(image[0] == 7.0)[0]) for image in moved]
    assert {*places} == {(row, column) for row in (1, 2, 3) for column in (0, 1, 2)}
    counts = [places.count(place) for place in {*places}]
    assert min(counts) > 15
    # What comes in at an edge is background: a black pixel, scaled.
    edge = moved[[place[0] == 3 for place in places]][:, 0, 0]
    assert edge == pytest.approx(-mnist._MEAN / mnist._DEVIATION, abs=1e-6)


def test_mnist_is_held_out_by_one_draw_and_scaled(tmp_path: Path) -> None:
    shapes = {name: (shape[0] // 1000, *shape[1:]) for name, shape in mnist._SHAPES.items()}
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.integers(0, 256 if "images" in name else 10, shape).astype(np.uint8)
        for name, shape in shapes.items()
    }
    np.savez(tmp_path / "mnist.npz", **arrays)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, "_SHAPES", shapes)
        patch.setattr(mnist, "VALIDATION", 5)
        real = np.random.default_rng
        draw = type("Draw", (), {"permutation": lambda self, n: real(0).permutation(60)})
        patch.setattr(np.random, "default_rng", lambda seed: draw())
        data = tasks.load("mnist-lenet5", data=tmp_path / "mnist.npz").data()
    order = np.random.default_rng(0).permutation(60)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [55, 5, 10]
    scaled = (arrays["train_images"][order[:5]] / 255.0 - 0.13066) / 0.30811
    assert data.validation.inputs[:, 0] == pytest.approx(scaled, abs=1e-4)
    assert np.array_equal(data.validation.targets, arrays["train_labels"][order[:5]])
    assert np.array_equal(data.train.targets, arrays["train_labels"][order[5:]])
    assert np.array_equal(data.test.targets, arrays["test_labels"])


def test_a_wrong_seed_or_name_is_refused() -> None:
    for seed in (-1, 2**63, True, 1.0):
        with pytest.raises(InvalidArgument, match="seed"):
            tasks.check_seed(seed, where="here")
    tasks.check_seed(2**63 - 1, where="here")
    with pytest.raises(InvalidArgument, match="a Task has its own data"):
        tasks.resolved(task(), "x.npz", where="here")


def test_a_file_of_a_task_is_given_the_data_path(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from karikomi.tasks import Task\n"
        "def made(data):\n    return Task(name='n', model=dict, data=lambda: None, about=str(data))\n"
        "def bare():\n    return made('none')\n"
    )
    load = tasks.load
    assert load(f"{tmp_path / 'mine.py'}:made", data="x.npz").about == "x.npz"
    assert load(f"{tmp_path / 'mine.py'}:bare").about == "none"
    with pytest.raises(KarikomiError, match="takes no data path"):
        load(f"{tmp_path / 'mine.py'}:bare", data="x.npz")
