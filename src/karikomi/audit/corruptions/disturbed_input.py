"""Which array of a network's inputs is corrupted and explained, where there are several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from karikomi.audit.corruptions.corruption import modality_of
from karikomi.tasks import Inputs


@dataclass(frozen=True, slots=True, eq=False)
class DisturbedInput:
    """One array among the inputs: all of them, or the entry `key` of a mapping or a tuple."""

    inputs: Inputs
    key: str | int | None
    array: np.ndarray

    def replaced(self, array: np.ndarray) -> Any:
        """Return the inputs with another array in this place; the others stay as they are."""
        if self.key is None:
            return array
        if isinstance(self.inputs, Mapping):
            return {**self.inputs, self.key: array}
        return tuple(array if k == self.key else own for k, own in enumerate(self.inputs))


def disturbed_input(inputs: Inputs, modality: str | None = None) -> DisturbedInput | None:
    """Return the array that can be disturbed; None where there is none, or more than one.

    `modality`: given by the user, for one array of any shape. Masks and types of tokens (integers of at most two
    values that follow each other) are inputs of their own, and stay as they are.

    >>> ids, mask = np.arange(8).reshape(2, 4), np.ones((2, 4), int)
    >>> disturbed_input({"input_ids": ids, "attention_mask": mask}).key
    'input_ids'
    """
    if isinstance(inputs, np.ndarray):
        known = modality is not None or modality_of(inputs) is not None
        return DisturbedInput(inputs, None, inputs) if known else None
    parts = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
    fitting = [(key, array) for key, array in parts if _varies(array) and modality_of(array)]
    return DisturbedInput(inputs, *fitting[0]) if len(fitting) == 1 else None


def _varies(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or (array.size > 0 and int(array.max()) - int(array.min()) > 1)
