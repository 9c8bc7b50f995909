"""Calibration batches as one batch: as many as fit in memory, and which of their examples are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from karikomi.errors import InvalidArgument
from karikomi.keras.arrays.variables import on_host
from karikomi.keras.facts.layer_calls import Batch, batches, run, watched
from karikomi.shrink.refit_outcome import MEMORY, held_examples, held_out

WHERE = "keras.shrink: data"
COPIES = 4
"""Inputs and outputs of each layer are held, of both models."""


@dataclass(frozen=True, slots=True)
class HeldBatches:
    """`inputs`, `targets`: of all batches, one after the other; targets None where there are none.

    `held`: boolean per example, out of the fit.
    """

    inputs: Any
    targets: Any
    held: np.ndarray

    def of_held(self) -> Batch:
        """Return the inputs and targets that are held out."""
        both = (self.inputs, self.targets)
        found: Any = keras.tree.map_structure(
            lambda leaf: None if leaf is None else leaf[self.held], both
        )
        return found


def held_batches(model: Any, data: Any) -> HeldBatches:
    """Return the first batches that fit in memory, of which every fifth is held out, or a part of a single one.

    Raises `InvalidArgument` for batches of different shapes, and for data of a single example.
    """
    taken: list[Batch] = []
    left = 0.0
    for inputs, targets in batches(data, where=WHERE):
        both: Any = keras.tree.map_structure(
            lambda leaf: None if leaf is None else on_host(leaf), (inputs, targets)
        )
        if not taken:
            left = MEMORY / (COPIES * _activations(model, inputs) / _size(both[0]))
        left -= _size(both[0])
        if left < 0 and len(taken) > 1:
            break
        taken.append(both)
    _check_shapes(taken)
    sizes = [_size(inputs) for inputs, _ in taken]
    held = np.repeat(held_out(len(sizes)), sizes)
    if len(sizes) == 1:
        count = held_examples(sizes[0])
        if not count:
            raise InvalidArgument(
                "compensation holds a part of the data out, and there is one example",
                where=WHERE,
                allowed="several batches, or one of several examples",
                hint="compensate=False",
            )
        held = np.arange(sizes[0]) >= sizes[0] - count
    whole: Any = keras.tree.map_structure(
        lambda *leaves: None if leaves[0] is None else np.concatenate(leaves), *taken
    )
    return HeldBatches(whole[0], whole[1], held)


def _size(inputs: Any) -> int:
    return len(keras.tree.flatten(inputs)[0])


def _activations(model: Any, inputs: Any) -> int:
    """Return the bytes of what all layers put out for some inputs."""
    found = [1]

    def see(_: Any, __: Any, ___: Any, ____: Any, result: Any) -> None:
        for leaf in keras.tree.flatten(result):
            if hasattr(leaf, "shape"):
                found[0] += 4 * int(np.prod([size or 1 for size in leaf.shape]))

    with watched(model, see):
        run(model, inputs)
    return found[0]


def _check_shapes(taken: list[Batch]) -> None:
    shapes = [
        [leaf.shape[1:] for leaf in keras.tree.flatten(batch) if leaf is not None]
        for batch in taken
    ]
    for other in shapes:
        if other != shapes[0]:
            raise InvalidArgument(
                "the batches have different shapes",
                where=WHERE,
                got=f"{shapes[0]} and {other}",
                allowed="batches of one shape, whatever their number of examples",
                hint="pad them, or compensate=False",
            )
