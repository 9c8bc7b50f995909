"""The built-in task that needs no download: scikit-learn's bundled 8x8 handwritten digits."""

from __future__ import annotations

import numpy as np

from karikomi.errors import Unavailable, install_hint
from karikomi.registry import register
from karikomi.tasks.splits import Data, Split
from karikomi.tasks.task import Recipe, Task


@register(
    "task",
    formula="1,797 images of 8x8, MLP 64-256-128-10 (50,826 parameters)",
    source="Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (scikit-learn's copy)",
)
def digits() -> Task:
    """Return the task: classify 8x8 digits with an MLP 64-256-128-10."""
    return Task(
        name="digits",
        model="digits-mlp",
        data=_data,
        augment=_jitter,
        about="8x8 handwritten digits, MLP 64-256-128-10",
        recipe=Recipe(
            batch_size=64,
            learning_rate=2e-3,
            train_epochs=60,
            prune_epochs=80,
            tune_epochs=30,
            sparsities=(0.8, 0.9, 0.94),
            entries=(16,),
            distill=0.9,
            temperature=4.0,
            threads=1,
        ),
    )


def _data() -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Unavailable(
            "the digits come with scikit-learn, which is not installed",
            where="task digits",
            hint=install_hint("demo"),
        ) from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    inputs = ((images[order] - 8.0) / 8.0).astype(np.float32)
    targets = labels[order].astype(np.int64)
    parts = (slice(0, 897), slice(897, 1297), slice(1297, None))
    return Data(*(Split(inputs[part], targets[part]) for part in parts))


def _jitter(inputs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return inputs + np.float32(0.1) * generator.standard_normal(inputs.shape, dtype=np.float32)
