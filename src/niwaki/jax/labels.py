"""What the numbers in a state speak of, as an array of bytes.

Separate because a pytree of arrays has no room for text, and a state that does not say of which tensors
it is cannot be read by whoever finds it in a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from niwaki.plan import PEAKS, Stage


class Labels(NamedTuple):
    """Of one stage: a name per number, and the tensors whose number is a largest magnitude."""

    owners: tuple[str, ...]
    peaks: frozenset[str]


def labels_of(plan: Sequence[Stage]) -> np.ndarray:
    """Return the labels of the stages, one uint8 per byte."""
    stages = [
        {
            "names": stage.names,
            "counts": stage.counts,
            "peaks": [kind in PEAKS for kind in stage.kinds],
            "rules": [type(part.rule).__name__ for part in stage.parts],
        }
        for stage in plan
    ]
    return np.frombuffer(json.dumps(stages).encode(), np.uint8)


def read_labels(labels: jax.Array | np.ndarray) -> list[Labels]:
    """Return what `labels_of` wrote, one per stage."""
    stages = json.loads(np.asarray(labels, np.uint8).tobytes())
    return [
        Labels(
            tuple(
                name
                for name, count in zip(stage["names"], stage["counts"], strict=True)
                for _ in range(count)
            ),
            frozenset(n for n, peak in zip(stage["names"], stage["peaks"], strict=True) if peak),
        )
        for stage in stages
    ]
