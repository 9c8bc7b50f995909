"""Tasks: splits that share no example, augmentation by whole pixels, metrics and digests on small known cases."""

from __future__ import annotations

import dataclasses
import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from karikomi import tasks
from karikomi.errors import InvalidArgument, KarikomiError, NonFinite
from karikomi.tasks import Data, Split, Task, mnist
from karikomi.tasks import splits as splits_module


def test_the_accuracy_is_the_share_of_largest_outputs() -> None:
    outputs = np.array([[1, 9, 2], [3, 1, 0], [0, 1, 8], [5, 4, 3], [-3, -1, -2]])
    targets = np.array([1, 1, 2, 2, 1])
    assert tasks.accuracy(outputs, targets) == 3 / 5
    assert task().judge(outputs, targets) == 3 / 5
    steps, labels = np.stack([outputs, outputs], axis=1), np.stack([targets, 0 * targets], axis=1)
    assert task(class_axis=-1).judge(steps, labels) == (3 + 2) / 10
    assert task().judge(steps.transpose(0, 2, 1), labels) == (3 + 2) / 10


def test_classes_are_on_axis_1_as_in_the_cross_entropy_of_torch() -> None:
    labels = np.array([[1, 1], [0, 1]])
    right = np.eye(2)[labels].transpose(0, 2, 1)
    assert task().judge(right, labels) == 1.0
    assert task(metric=tasks.accuracy).judge(right, labels) == 1.0
    # As many steps as classes: read along the last axis, the two mixed labels are half wrong.
    assert task(class_axis=-1).judge(right, labels) == 0.5
    pixels = np.eye(3)[np.array([[[0, 1], [2, 0]]])].transpose(0, 3, 1, 2)
    assert task().judge(pixels, np.array([[[0, 1], [2, 1]]])) == 3 / 4


def test_ignored_targets_do_not_count() -> None:
    outputs = np.array([[9, 1], [9, 1], [9, 1], [1, 9]])
    assert task().judge(outputs, np.array([0, 1, -100, -100])) == 1 / 2
    assert task(ignore_index=255).judge(outputs, np.array([0, 1, 255, 255], np.uint8)) == 1 / 2
    with pytest.raises(InvalidArgument, match="no target counts"):
        task().judge(outputs, np.full(4, -100))
    with pytest.raises(InvalidArgument, match=r"a target is no class.*got 255; allowed: 0..1"):
        task().judge(outputs, np.array([0, 1, 255, 255]))


def test_outputs_with_a_nan_predict_no_class() -> None:
    """NumPy takes a NaN for the largest: a network that diverged was right about all of class 0."""
    outputs = np.array([[np.nan, np.nan], [0.0, np.nan], [2.0, 1.0], [-np.inf, np.inf]])
    assert task().judge(outputs, np.array([0, 1, 0, 1])) == 0.5
    assert task().predictions(outputs, np.array([0, 1, 0, 1]))[0].tolist() == [-1, -1, 0, 1]
    steps = np.stack([outputs, outputs[::-1]], axis=-1)
    assert task().judge(steps, np.array([[0, 1], [1, 0], [0, 1], [1, 0]])) == 0.5


@pytest.mark.parametrize(
    ("outputs", "targets", "said"),
    [
        ((4, 2, 3), np.zeros((4, 2), int), "the task's class_axis=2 would fit"),
        ((4, 3), np.zeros((4, 2), int), "metric=function"),
        ((4, 3), np.zeros(4), "metric=function"),
        ((4, 3), np.zeros((4, 3), int), r"class numbers: targets.argmax\(1\)"),
        ((4, 3), np.eye(4, 3), r"class numbers: targets.argmax\(1\)"),
        ((4, 3), np.zeros((4, 1), int), r"targets\[..., 0\] would fit"),
        ((4, 3, 5, 6), np.zeros((4, 5, 6, 1), int), r"targets\[..., 0\] would fit"),
        ((4, 1), np.zeros(4, int), "two or more classes"),
        ((4,), np.zeros(4, int), "metric=function"),
    ],
)
def test_outputs_that_have_no_class_per_target_are_refused(
    outputs: tuple[int, ...], targets: np.ndarray, said: str
) -> None:
    with pytest.raises(InvalidArgument, match=rf"^task t: accuracy needs .*{said}"):
        task().judge(np.zeros(outputs), targets)


@pytest.mark.parametrize(
    "fields", [{"class_axis": 0}, {"class_axis": 1.0}, {"ignore_index": None}, {"goal": "least"}]
)
def test_axes_labels_and_goals_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="^task t: "):
        task(**fields)


def test_each_metric_has_a_direction() -> None:
    error = task(metric="mean_squared_error")
    assert error.judge(np.array([[1.0], [3.0]]), np.array([[1.0], [1.0]])) == 2.0
    assert (error.direction, error.drop(0.25, 1.0), error.assumes_goal) == ("min", 0.75, False)
    assert (task().direction, task().drop(1.0, 0.25), task().assumes_goal) == ("max", 0.75, False)

    def own(outputs: np.ndarray, targets: np.ndarray) -> float:
        return 0.0

    assert (task(metric=own).direction, task(metric=own).assumes_goal) == ("max", True)
    stated = task(metric=own, goal="min")
    assert (stated.direction, stated.drop(0.25, 1.0), stated.assumes_goal) == ("min", 0.75, False)
    with pytest.raises(InvalidArgument, match="unknown goal; got 'min'; allowed: max"):
        task(goal="min")
    with pytest.raises(InvalidArgument, match=r"differ in shape; got \(2, 1\) and \(2,\)"):
        error.judge(np.zeros((2, 1)), np.zeros(2))


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


def test_the_digest_is_of_the_values_in_whatever_layout_and_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = np.arange(60, dtype=np.float32).reshape(12, 5)
    layouts = [plain, np.asfortranarray(plain), np.repeat(plain, 2, axis=0)[::2]]
    digests = {Data(*[Split(array, np.arange(12))] * 3).fingerprint() for array in layouts}
    monkeypatch.setattr(splits_module, "_BLOCK", 7)
    digests |= {Data(*[Split(array, np.arange(12))] * 3).fingerprint() for array in layouts}
    assert len(digests) == 1
    two = Data(*[Split({"a": plain, "b": plain}, np.arange(12))] * 3).fingerprint()
    assert two not in digests
    assert two != Data(*[Split({"a": plain, "c": plain}, np.arange(12))] * 3).fingerprint()


def test_mapped_data_is_checked_and_digested_in_pieces(tmp_path: Path) -> None:
    shape = (1 << 10, 1 << 14)
    inputs = np.memmap(tmp_path / "x", np.float32, "w+", shape=shape)
    split = Split(inputs, np.zeros(len(inputs), np.int64))
    data = Data(split, split, split)
    tracemalloc.start()
    try:
        assert tasks.checked_data(task(data=lambda: data)).train.inputs is inputs
        data.fingerprint()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert inputs.nbytes == 64 << 20 and most < 8 << 20


def test_batches_are_gathered_into_a_split() -> None:
    """Of a loader, a generator, or a stream without an end; in order, and cut at `most`."""
    pairs = [(np.full((2, 3), k), np.array([k, k])) for k in range(3)]
    gathered = Split.of(iter(pairs))
    assert np.array_equal(gathered.targets, [0, 0, 1, 1, 2, 2])
    assert isinstance(gathered.inputs, np.ndarray)
    assert np.array_equal(gathered.inputs[:, 1], [0, 0, 1, 1, 2, 2])
    endless = itertools.cycle(pairs)
    assert np.array_equal(Split.of(endless, most=3).targets, [0, 0, 1])
    assert next(endless)[1][0] == 2, "no batch more than needed is drawn"
    named = Split.of(({"a": x, "b": x + 1, "labels": y} for x, y in pairs), targets="labels")
    assert [name for name in named.arrays()] == ["inputs['a']", "inputs['b']"] and len(named) == 6
    both = Split.of([((x, x + 1), y) for x, y in pairs])
    assert isinstance(both.inputs, tuple) and np.array_equal(both.inputs[1][:, 0], both.targets + 1)
    several = both.take(np.array([5, 0]))
    assert [array[0, 0] for array in several.arrays().values()] == [2, 3] and len(several) == 2


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "there are no batches"),
        ([{"x": np.ones(1), "labels": np.ones(1)}], r'labels.*allowed: .*targets="key"'),
        ([np.ones(3)], "got ndarray"),
        ([(np.ones((1, 2)), np.ones(1)), (np.ones((1, 3)), np.ones(1))], "differ in form.*pad"),
    ],
)
def test_batches_of_another_form_are_refused(batches: list[Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        Split.of(batches)


@pytest.mark.parametrize("most", [0, -1, 1.5])
def test_examples_to_take_are_a_whole_number(most: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"Split.of: .*most.* got {most}"):
        Split.of([(np.ones(2), np.ones(2))], most=most)


def test_tensors_of_a_graph_are_read_and_types_that_numpy_lacks_are_refused() -> None:
    """Features that another network computed are in its graph, and often in bfloat16."""
    torch = pytest.importorskip("torch")
    features = 2.0 * torch.ones(4, 2, requires_grad=True)
    found = Split.of([(features, torch.arange(4))])
    assert np.array_equal(found.inputs, np.full((4, 2), 2.0, np.float32))
    good = Split(features, torch.arange(4))
    assert tasks.checked_data(task(data=lambda: Data(good, good, good))).test.inputs[0, 0] == 2.0  # type: ignore[index]
    small = features.bfloat16()
    with pytest.raises(InvalidArgument, match="Split.of: .*BFloat16.*float32 first"):
        Split.of([(small, torch.arange(4))])
    with pytest.raises(InvalidArgument, match="the train split: .*BFloat16.*float32 first"):
        tasks.checked_data(
            task(data=lambda: Data(Split(small, torch.arange(4)), good, good))  # type: ignore[arg-type]
        )


def test_a_loader_or_a_tensor_in_the_data() -> None:
    torch = pytest.importorskip("torch")

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return ((torch.full((2,), float(k)), torch.tensor(k)) for k in range(5))

    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    good = Split(torch.ones(4, 2), torch.arange(4))
    found = tasks.checked_data(task(data=lambda: Data(Split.of(loader), good, good)))
    assert np.array_equal(found.train.targets, range(5))
    assert isinstance(found.test.inputs, np.ndarray) and found.test.inputs.shape == (4, 2)
    with pytest.raises(InvalidArgument, match=r"got DataLoader; gather .*Split.of\(loader\)"):
        tasks.checked_data(task(data=lambda: Data(loader, good, good)))


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
