"""Trained CIFAR-10 ResNets on the user's folder of images and weights: nothing is trained but what recovers."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from karikomi.errors import BadFile, InvalidArgument
from karikomi.registry import register
from karikomi.tasks.splits import Data, Split, partition
from karikomi.tasks.task import Recipe, Task

PARTS = {"search": 2_000, "certify": 5_000, "test": 3_000}
"""How the test images are used: the published weights have seen all training images, which only recover."""

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION = np.array(
    [0.229, 0.224, 0.225], np.float32
)  # as the published weights were trained with
_SHAPE = (32, 32, 3)
_RECIPE = Recipe(
    batch_size=128,
    learning_rate=1e-3,
    prune_epochs=4,
    tune_epochs=2,
    sparsities=(0.5, 0.7, 0.8, 0.9),
    entries=(32, 16),
    learned_epochs=5,
)
_WIDTHS = (0.9, 0.8, 0.7)
"""Of the channels inside the blocks; below, four epochs do not bring back what is lost."""
_FORM = "conv1, three groups of basic blocks of 16, 32 and 64 channels, linear; shortcuts without weights (option A)"
_SOURCE = "He et al. 2016, Deep residual learning; the weights of Idelbayev 2018"


@register("task", name="cifar10-resnet20", formula=f"CIFAR-10, ResNet-20: {_FORM}", source=_SOURCE)
def resnet20(data: str | Path | None) -> Task:
    """Return the task: a folder with cifar10_train.npz, cifar10_test.npz and resnet20_cifar10.safetensors."""
    return _task("resnet20", data)


@register("task", name="cifar10-resnet56", formula=f"CIFAR-10, ResNet-56: {_FORM}", source=_SOURCE)
def resnet56(data: str | Path | None) -> Task:
    """Return the task: a folder with cifar10_train.npz, cifar10_test.npz and resnet56_cifar10.safetensors."""
    return _task("resnet56", data)


def _task(network: str, data: str | Path | None) -> Task:
    name = f"cifar10-{network}"
    return Task(
        name=name,
        model=f"cifar-{network}",
        data=partial(_cifar10, data, name),
        weights=partial(_weights, data, f"{network}_cifar10.safetensors", name),
        augment=_moved,
        about=f"CIFAR-10, a trained {network.capitalize().replace('net', 'Net-')}, shifts and flips while recovering",
        recipe=_RECIPE,
        presets={"cpu": {"widths": _WIDTHS}},
    )


def _folder(data: str | Path | None, task: str) -> Path:
    if data is None:
        raise InvalidArgument(
            "this task needs a folder of data", where=f"task {task}", hint="--data path/to/folder"
        )
    return Path(data)


def _cifar10(data: str | Path | None, task: str) -> Data:
    folder = _folder(data, task)
    train = _split(folder / "cifar10_train.npz", 50_000)
    judged = _split(folder / "cifar10_test.npz", 10_000)
    parts = partition(judged.targets, PARTS, seed=0)
    search, certify, test = (judged.take(parts[name]) for name in PARTS)
    return Data(train, search, test, certify)


def _split(path: Path, count: int) -> Split:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            images, labels = stored["images"], stored["labels"]
    except OSError as error:
        raise BadFile(
            f"cannot read the data file ({error.strerror or error})", where=str(path)
        ) from error
    except (
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
    ) as error:
        raise BadFile(
            "this is not the CIFAR-10 archive, or it is cut short",
            where=str(path),
            got=type(error).__name__,
            allowed="an .npz with images and labels",
        ) from error
    if images.shape != (count, *_SHAPE) or images.dtype != np.uint8 or labels.shape != (count,):
        raise BadFile(
            "the images have another form",
            where=str(path),
            got=f"{images.dtype} {images.shape}, labels {labels.shape}",
            allowed=f"uint8 {(count, *_SHAPE)}",
        )
    scaled = (images.astype(np.float32) / np.float32(255) - _MEAN) / _DEVIATION
    return Split(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)), labels.astype(np.int64))


def _weights(data: str | Path | None, file: str, task: str) -> dict[str, np.ndarray]:
    path = _folder(data, task) / file
    try:
        arrays = safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise BadFile("cannot read the trained weights", where=str(path), got=error) from error
    # The published files are without the counters of the batch norms.
    counters = [name.replace("running_mean", "num_batches_tracked") for name in arrays]
    return {**{n: np.zeros((), np.int64) for n in counters if "num_batches" in n}, **arrays}


def _moved(inputs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return images that are shifted by up to four pixels, and half of them mirrored."""
    count, _, height, width = inputs.shape
    padded = np.pad(inputs, ((0, 0), (0, 0), (4, 4), (4, 4)))
    tops, lefts = generator.integers(0, 9, (2, count))
    mirrored = generator.random(count) < 0.5
    rows = tops[:, None] + np.arange(height)
    columns = lefts[:, None] + np.where(mirrored[:, None], np.arange(width)[::-1], np.arange(width))
    places = np.arange(count)[:, None, None]
    return np.ascontiguousarray(
        padded[places, :, rows[:, :, None], columns[:, None, :]].transpose(0, 3, 1, 2)
    )
