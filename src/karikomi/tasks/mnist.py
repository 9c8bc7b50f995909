"""Han et al.'s two MNIST networks, LeNet-300-100 and LeNet-5 (Caffe), on the user's ``mnist.npz``."""

from __future__ import annotations

import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from karikomi.errors import BadFile, InvalidArgument
from karikomi.registry import register
from karikomi.tasks.splits import Data, Split
from karikomi.tasks.task import Recipe, Task

VALIDATION = 5_000
"""Training images that are held out to decide; the 10,000 test images only measure."""

_SHAPES = {
    "train_images": (60_000, 28, 28),
    "train_labels": (60_000,),
    "test_images": (10_000, 28, 28),
    "test_labels": (10_000,),
}
_DEEP = {
    **{"learning_rate": 3e-3, "weight_decay": 0.0, "learned_rate": 3e-3},
    **{"rates": (2.0, 1.4), "entries": (16,)},
}
"""What both networks have in common where a file of a few kilobytes is the goal."""

_MEAN, _DEVIATION = 33.318421 / 255, 78.567490 / 255  # of the 60,000 training images


@register(
    "task",
    name="mnist-lenet300",
    formula="MNIST, MLP 784-300-100-10 (266,610 parameters)",
    source="LeCun et al. 1998; Han, Mao and Dally 2016, Deep Compression, table 1",
)
def lenet300(data: str | Path | None) -> Task:
    """Return the task: MNIST with LeNet-300-100, trained with shifts of one pixel."""
    return Task(
        name="mnist-lenet300",
        model="lenet300",
        data=partial(_mnist, data, "mnist-lenet300"),
        augment=_shift,
        about="MNIST, LeNet-300-100, shifts of up to one pixel while training",
        recipe=Recipe(
            batch_size=256,
            learning_rate=2e-3,
            train_epochs=40,
            prune_epochs=20,
            tune_epochs=6,
            sparsities=(0.9, 0.94, 0.96, 0.97, 0.98),
            entries=(16, 8),
        ),
        presets={
            "deep-compression": {
                **_DEEP,
                "batch_size": 512,
                "train_epochs": 12,
                "units": (128, 64),
                "learned": (0.138,),
                "learned_epochs": 50,
            }
        },
    )


@register(
    "task",
    name="mnist-lenet5",
    formula="MNIST, convolutions 20 and 50 of 5x5, then 500 and 10 (431,080 parameters)",
    source="Han, Mao and Dally 2016, Deep Compression, table 1 (the Caffe variant of LeNet-5)",
)
def lenet5(data: str | Path | None) -> Task:
    """Return the task: MNIST with the Caffe variant of LeNet-5, trained with shifts of one pixel."""
    return Task(
        name="mnist-lenet5",
        model="lenet5",
        data=partial(_mnist, data, "mnist-lenet5"),
        augment=_shift,
        about="MNIST, LeNet-5 (Caffe), shifts of up to one pixel while training",
        recipe=Recipe(
            batch_size=512,
            learning_rate=2e-3,
            train_epochs=15,
            prune_epochs=8,
            tune_epochs=3,
            sparsities=(0.9, 0.96, 0.98, 0.99),
            entries=(16, 8),
        ),
        presets={
            "deep-compression": {
                **_DEEP,
                "batch_size": 256,
                "train_epochs": 4,
                "units": (10, 24, 48),
                "learned": (0.062,),
                "learned_epochs": 32,
            }
        },
    )


def _mnist(path: str | Path | None, task: str) -> Data:
    if path is None:
        raise InvalidArgument(
            "this task needs a data file", where=f"task {task}", hint="--data path/to/mnist.npz"
        )
    arrays = _read(Path(path), task)
    order = np.random.default_rng(0).permutation(60_000)
    train = Split(_scaled(arrays["train_images"]), arrays["train_labels"].astype(np.int64))
    test = Split(_scaled(arrays["test_images"]), arrays["test_labels"].astype(np.int64))
    return Data(train.take(order[VALIDATION:]), train.take(order[:VALIDATION]), test)


def _read(path: Path, task: str) -> dict[str, np.ndarray]:
    try:
        # Opened here, because NumPy leaves a file open that is not an archive.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in _SHAPES}
    except OSError as error:
        raise BadFile(
            f"cannot read the data file ({error.strerror or error})",
            where=f"task {task}",
            got=str(path),
        ) from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadFile(
            "this is not the MNIST archive, or it is cut short",
            where=str(path),
            got=type(error).__name__,
            allowed=f"an .npz with {', '.join(_SHAPES)}",
        ) from error
    for name, shape in _SHAPES.items():
        if arrays[name].shape != shape or arrays[name].dtype != np.uint8:
            raise BadFile(
                f"{name} has another form",
                where=str(path),
                got=f"{arrays[name].dtype} {arrays[name].shape}",
                allowed=f"uint8 {shape}",
            )
    return arrays


def _scaled(images: np.ndarray) -> np.ndarray:
    unit = images.astype(np.float32) / np.float32(255)
    return ((unit - np.float32(_MEAN)) / np.float32(_DEVIATION))[:, None]


def _shift(inputs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    background = np.float32(-_MEAN / _DEVIATION)
    padded = np.pad(inputs, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=background)
    height, width = inputs.shape[2:]
    shifted = np.empty_like(inputs)
    which = generator.integers(0, 9, len(inputs))
    for place in range(9):
        top, left = divmod(place, 3)
        chosen = which == place
        shifted[chosen] = padded[chosen, :, top : top + height, left : left + width]
    return shifted
