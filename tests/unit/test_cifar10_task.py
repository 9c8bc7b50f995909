"""The trained CIFAR-10 tasks on small stand-ins for their files: parts, scaling, augmentation, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from karikomi.errors import BadFile, InvalidArgument
from karikomi.tasks import cifar10, load


def archive(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(count)
    images = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    np.savez(path, images=images, labels=labels)
    return images, labels


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of 40 training and 50 test images."""
    archive(tmp_path / "cifar10_train.npz", 40)
    archive(tmp_path / "cifar10_test.npz", 50)
    counts = {50_000: 40, 10_000: 50}
    whole = cifar10._split
    monkeypatch.setattr(cifar10, "_split", lambda path, count: whole(path, counts[count]))
    monkeypatch.setattr(cifar10, "PARTS", {"search": 10, "certify": 25, "test": 15})
    return tmp_path


def test_the_test_images_choose_certify_and_measure(small: Path) -> None:
    data = load("cifar10-resnet20", data=small).data()
    assert data.certify is not None
    parts = (data.validation, data.certify, data.test)
    assert [len(part) for part in (data.train, *parts)] == [40, 10, 25, 15]
    together = np.concatenate([part.inputs for part in parts])
    assert len(np.unique(together.reshape(50, -1), axis=0)) == 50, "each image is in one part"
    assert np.bincount(data.validation.targets, minlength=10).tolist() == [1] * 10
    assert data.fingerprint() == load("cifar10-resnet56", data=small).data().fingerprint()


def test_pixels_are_scaled_by_channel(tmp_path: Path) -> None:
    images, labels = archive(tmp_path / "a.npz", 20)
    found = cifar10._split(tmp_path / "a.npz", 20)
    wanted = (images[3, 5, 7] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert found.inputs.shape == (20, 3, 32, 32)
    assert found.inputs[3, :, 5, 7] == pytest.approx(wanted, rel=1e-5)
    assert found.targets.tolist() == labels.tolist()


def test_images_are_moved_by_at_most_four_and_mirrored() -> None:
    image = np.zeros((1, 3, 32, 32), np.float32)
    image[0, :, 10, 20] = 1, 2, 3
    moved = cifar10._moved(np.repeat(image, 400, axis=0), np.random.default_rng(0))
    assert moved.shape == (400, 3, 32, 32) and moved.dtype == np.float32
    places = {tuple(np.argwhere(m[0])[0].tolist()) for m in moved}
    rows, columns = {row for row, _ in places}, {column for _, column in places}
    assert rows == set(range(6, 15))
    assert columns == set(range(16, 25)) | set(range(31 - 24, 31 - 15))
    assert (moved.sum(axis=(2, 3)) == [1, 2, 3]).all()


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no archive"])
def test_files_that_are_none_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cifar10_train.npz").write_bytes(content)
    task = load("cifar10-resnet20", data=tmp_path)
    with pytest.raises(BadFile, match="not the CIFAR-10 archive"):
        task.data()
    archive(tmp_path / "cifar10_train.npz", 30)
    with pytest.raises(BadFile, match="another form"):
        task.data()
    assert task.weights is not None
    with pytest.raises(BadFile, match="trained weights"):
        task.weights()


def test_the_folder_is_needed() -> None:
    for part in ("data", "weights"):
        call: Any = getattr(load("cifar10-resnet56"), part)
        with pytest.raises(InvalidArgument, match="needs a folder"):
            call()


def test_the_published_weights_reach_their_accuracy(data_dir: Path) -> None:
    torch = pytest.importorskip("torch")
    from karikomi import registry

    task = load("cifar10-resnet20", data=data_dir)
    data = cifar10._split(data_dir / "cifar10_test.npz", 10_000)
    some = data.take(np.arange(500))
    assert task.weights is not None
    runner = registry.framework("torch").runner_for(task, None, seed=0)
    with torch.no_grad():
        outputs = runner.outputs(dict(task.weights()), some.inputs)
    # 92.6 % on all 10,000; a standard error of 1.2 points on 500.
    assert 0.89 <= task.judge(outputs, some.targets) <= 0.96
