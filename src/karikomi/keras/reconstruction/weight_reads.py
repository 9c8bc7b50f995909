"""Which inputs a kernel multiplies, by the type of its layer; one registered function for each kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from karikomi.keras.arrays.variables import on_host

ENTRIES = 1 << 22
"""Number of entries in memory at a time, or those of one example if more."""

Blocks = Iterator[np.ndarray]
"""Float32 arrays (groups, samples, inputs): a unit's outputs without bias are ``block @ row`` of the kernel."""


class KernelMatrix(NamedTuple):
    """How a kernel lies as a matrix (rows, inputs): axes whose indices name a row, and axes that are summed over.

    >>> matrix = KernelMatrix((1,), (0,)).of(np.arange(6).reshape(2, 3))
    >>> matrix.tolist(), KernelMatrix((1,), (0,)).restored(matrix, (2, 3)).tolist()
    ([[0, 3], [1, 4], [2, 5]], [[0, 1, 2], [3, 4, 5]])
    """

    rows: tuple[int, ...]
    inputs: tuple[int, ...]

    def of(self, array: np.ndarray) -> np.ndarray:
        """Return an array of the kernel's shape as (rows, inputs)."""
        height = math.prod(array.shape[axis] for axis in self.rows)
        width = math.prod(array.shape[axis] for axis in self.inputs)
        return array.transpose(self.rows + self.inputs).reshape(height, width)

    def restored(self, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return (rows, inputs) in the kernel's shape."""
        axes = self.rows + self.inputs
        turned = matrix.reshape([shape[axis] for axis in axes])
        return np.ascontiguousarray(turned.transpose(np.argsort(axes)))


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a layer: its first argument and the others."""

    inputs: Any
    options: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], options: dict[str, Any]) -> LayerCall:
        """Return the call with these arguments; the inputs may be named."""
        if args:
            return cls(args[0], options)
        first, *others = options
        return cls(options[first], {name: options[name] for name in others})


def floats(tensor: Any) -> np.ndarray:
    """Return a tensor on the host, in float32."""
    return np.asarray(on_host(tensor)).astype(np.float32)


def _inputs(_: Any, call: LayerCall) -> np.ndarray:
    return floats(call.inputs)


@dataclass(frozen=True, slots=True)
class Reader:
    """How the inputs of a variable are read from its layer.

    `matrix`: of a layer. `seen`: what a call of the layer multiplies, with the weights that the model has then.
    `blocks`: of a layer and what was seen.
    """

    matrix: Callable[[Any], KernelMatrix]
    seen: Callable[[Any, LayerCall], np.ndarray]
    blocks: Callable[[Any, np.ndarray], Blocks]


READERS: dict[tuple[type, str], Reader] = {}
"""Type of a layer, name of its variable -> how its inputs are read; a new layer is a new entry."""

Function = Callable[[Any, np.ndarray], Blocks]


def reads(
    leaf: str,
    matrix: Callable[[Any], KernelMatrix],
    *kinds: type,
    seen: Callable[[Any, LayerCall], np.ndarray] = _inputs,
) -> Callable[[Function], Function]:
    """Return a decorator that registers a function ``(layer, seen) -> blocks`` for a variable of these layers."""

    def keep(blocks: Function) -> Function:
        READERS.update({(kind, leaf): Reader(matrix, seen, blocks) for kind in kinds})
        return blocks

    return keep


def reader_of(layer: Any, leaf: str) -> Reader | None:
    """Return how a variable of a layer is read; ``None`` for other layers and those with a ``call`` of their own."""
    for kind in type(layer).__mro__:
        if (kind, leaf) in READERS:
            return READERS[kind, leaf] if type(layer).call is kind.call else None
    return None


def in_parts(array: np.ndarray, entries: int) -> Iterator[np.ndarray]:
    """Yield so many examples at a time that `entries` for each of them fit into `ENTRIES`."""
    step = max(ENTRIES // max(entries, 1), 1)
    yield from (array[start : start + step] for start in range(0, len(array), step))


def in_rows(array: np.ndarray) -> Blocks:
    """Yield the vectors along the last axis as samples of one group."""
    rows = array.reshape(math.prod(array.shape[:-1]), array.shape[-1])
    yield from (part[None] for part in in_parts(rows, rows.shape[1]))
