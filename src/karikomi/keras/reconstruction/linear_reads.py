"""The inputs of Dense and EinsumDense layers, of which attention is made."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from keras import layers

from karikomi.keras.reconstruction.weight_reads import (
    Blocks,
    KernelMatrix,
    in_parts,
    in_rows,
    reads,
)


class Letters(NamedTuple):
    """An equation ``inputs,kernel->outputs`` by the letters of its kernel.

    `groups`: in all three. `units`: not in the inputs. `summed`: not in the outputs. `inputs`: as written.

    >>> Letters.of("...cd,cde->...ce")
    Letters(inputs='...cd', kernel='cde', groups='c', units='e', summed='d')
    """

    inputs: str
    kernel: str
    groups: str
    units: str
    summed: str

    @classmethod
    def of(cls, equation: str) -> Letters:
        """Return the letters of an equation."""
        operands, _, outputs = equation.replace(" ", "").partition("->")
        inputs, _, kernel = operands.partition(",")
        units = "".join(letter for letter in kernel if letter not in inputs)
        summed = "".join(letter for letter in kernel if letter not in outputs)
        groups = "".join(letter for letter in kernel if letter not in units + summed)
        return cls(inputs, kernel, groups, units, summed)

    @property
    def matrix(self) -> KernelMatrix:
        """How the kernel lies."""
        rows = tuple(self.kernel.index(letter) for letter in self.groups + self.units)
        return KernelMatrix(rows, tuple(self.kernel.index(letter) for letter in self.summed))


@reads("kernel", lambda _: KernelMatrix((1,), (0,)), layers.Dense)
def dense(_: Any, values: np.ndarray) -> Blocks:
    """Yield the vectors along the last axis."""
    yield from in_rows(values)


@reads("kernel", lambda layer: Letters.of(layer.equation).matrix, layers.EinsumDense)
def einsum(layer: Any, values: np.ndarray) -> Blocks:
    """Yield the inputs with the letters that are summed over last, and those that the kernel has in common first.

    A letter that neither the kernel nor the outputs have is summed over before.
    """
    letters, outputs = Letters.of(layer.equation), layer.equation.partition("->")[2]
    own = letters.groups + letters.summed
    free = "".join(n for n in letters.inputs if n not in own and n in outputs and n != ".")
    dots = "..." if "..." in letters.inputs else ""
    turned = np.einsum(f"{letters.inputs}->{letters.groups}{dots}{free}{letters.summed}", values)
    count, width = len(letters.groups), len(letters.summed)
    ends = turned.ndim - width
    groups, inputs = math.prod(turned.shape[:count]), math.prod(turned.shape[ends:])
    samples = turned.reshape(groups, math.prod(turned.shape[count:ends]), inputs).swapaxes(0, 1)
    yield from (part.swapaxes(0, 1) for part in in_parts(samples, groups * inputs))
