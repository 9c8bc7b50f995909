"""What becomes of each tensor of a network: a weight's grid, a vector's grid, or nothing, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from karikomi.quantize.grids import Coded
from karikomi.quantize.nearest import uniform
from karikomi.quantize.octave_grid import octaves

Tensor = TypeVar("Tensor")
LARGEST_VECTOR = 256
"""Entries up to which a tensor of a layer that is not known is a vector, whatever its shape."""
VECTOR_BITS, VECTOR_BITS_AT_RATE = 16, 8
PER_OCTAVE, PER_OCTAVE_AT_RATE = 64, 16


@dataclass(frozen=True, slots=True)
class Eligible(Generic[Tensor]):
    """Name -> tensor: `weights` get the grid that was asked for; `vectors` one that costs no accuracy.

    Vectors are biases, gains of norms and what else is small, and the means of batch norms; `variances` are theirs
    too. `left_alone`: name -> why a tensor of the network stays as it is. A tensor with several names has its first.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)
    variances: dict[str, Tensor] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, Tensor]:
        """All tensors that are quantized."""
        return {**self.weights, **self.vectors, **self.variances}


class Codes(dict[str, Coded]):
    """Name of a tensor -> codes and grid; `left_alone`: name -> why a tensor of the network stays as it is.

    `notes`: name -> what a method that compensates could not do: a weight that no layer reads got the nearest values,
    the Gram matrix of its inputs needed more damping, or fewer inputs were seen than the layer has.
    """

    def __init__(
        self,
        coded: Mapping[str, Coded],
        left_alone: Mapping[str, str],
        notes: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(coded)
        self.left_alone = dict(left_alone)
        self.notes = dict(notes or {})


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Return whether a tensor has two axes or more that are longer than 1.

    >>> is_matrix((3, 1, 2)), is_matrix((1, 7))
    (True, False)
    """
    return sum(length > 1 for length in shape) > 1


def is_large_matrix(shape: tuple[int, ...]) -> bool:
    """Return whether a tensor of a layer that is not known is a weight."""
    return int(np.prod(shape)) > LARGEST_VECTOR and is_matrix(shape)


def vector_codes(array: np.ndarray, *, variances: bool, coarse: bool, name: str) -> Coded:
    """Return the codes of a vector: 16 bits in one scale, or 64 equal ratios to the octave for `variances`.

    `coarse`: beside weights at a rate, 8 bits and 16 ratios. Raises `NonFinite` for the array `name`.

    >>> vector_codes(np.ones(3, np.float32), variances=False, coarse=True, name="bias").grid.bits
    8
    """
    if variances:
        return octaves(array, per_octave=PER_OCTAVE_AT_RATE if coarse else PER_OCTAVE, name=name)
    bits = VECTOR_BITS_AT_RATE if coarse else VECTOR_BITS
    return uniform(array, bits=bits, axis=None, name=name)
