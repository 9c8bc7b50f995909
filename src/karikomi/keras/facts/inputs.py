"""Facts about what kernels multiply: the norms of their inputs, and how often they are used."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from keras import layers

from karikomi.errors import Unsupported
from karikomi.keras.facts.layer_calls import numbers
from karikomi.keras.internals import kernel_of
from karikomi.keras.layers.prunable import Oriented
from karikomi.keras.layers.unit_axes import CONVOLUTIONS, DEPTHWISE, TRANSPOSED


class InputNorms:
    """The L2 norm over samples and positions of the input that each weight multiplies.

    Dense: per input. Convolutions: per input channel and kernel position, the zeros of the padding counted
    as inputs. EinsumDense: per index of the axes that are summed over.
    """

    def __init__(self, wanted: Mapping[int, Oriented]) -> None:
        self._wanted = wanted
        self._squares: dict[str, np.ndarray] = {}

    def see(self, layer: Any, args: tuple[Any, ...], _: Any) -> None:
        """Add the inputs of one call of a layer."""
        value = self._wanted.get(id(kernel_of(layer)))
        if value is not None and args:
            squares = _squares(layer, value, np.square(numbers(args[0])))
            self._squares[value.name] = self._squares.get(value.name, 0.0) + squares

    def result(self) -> dict[str, np.ndarray]:
        """Return name -> norms, broadcastable to the variable's own shape."""
        missing = [item.name for item in self._wanted.values() if item.name not in self._squares]
        if missing:
            raise Unsupported(
                "the inputs of this weight cannot be seen",
                where=f"input_norm: {missing[0]}",
                hint=f"exclude={missing[0]!r}",
            )
        return {name: np.sqrt(square) for name, square in self._squares.items()}


class Macs:
    """The multiply-accumulates of each kernel in one run of the model, per example."""

    def __init__(self, wanted: Mapping[int, Oriented]) -> None:
        self._wanted = wanted
        self._counts: dict[str, float] = {}

    def see(self, layer: Any, args: tuple[Any, ...], result: Any) -> None:
        """Add one call of a layer."""
        for variable in layer.trainable_variables + layer.non_trainable_variables:
            value = self._wanted.get(id(variable))
            if value is None or value.layer is not layer or not args:
                continue
            shape = args[0].shape if isinstance(layer, TRANSPOSED) else result.shape
            # What lies on the first axis: outputs, of transposed ones the inputs.
            units = value.shape[0]
            # A separable layer's first kernel is used at as many positions as its second.
            if value.variable.name == "depthwise_kernel":
                units = int(layer.pointwise_kernel.shape[-1])
            positions = math.prod(map(int, shape[1:])) / units
            before = self._counts.get(value.name, 0.0)
            self._counts[value.name] = before + positions * math.prod(value.shape)

    def result(self) -> dict[str, float]:
        """Return name -> multiply-accumulates."""
        return self._counts


READERS = {"input_norm": InputNorms, "macs": Macs}
"""Fact -> what measures it from the inputs of layers; a new fact of inputs is a new entry."""


def _squares(layer: Any, oriented: Oriented, squares: np.ndarray) -> np.ndarray:
    if isinstance(layer, layers.EinsumDense):
        return _of_einsum(layer, squares)
    if isinstance(layer, (*CONVOLUTIONS, *DEPTHWISE)):
        return _of_convolution(layer, oriented, squares)
    if isinstance(layer, layers.Dense):
        return squares.reshape(-1, squares.shape[-1]).sum(axis=0)[:, None]
    raise Unsupported(
        f"norms of inputs are not measured for {type(layer).__name__}",
        where=f"input_norm: {oriented.name}",
        hint=f"exclude={oriented.name!r}",
    )


def _of_einsum(layer: Any, squares: np.ndarray) -> np.ndarray:
    operands = layer.equation.replace(" ", "").partition("->")[0]
    inputs, _, kernel = operands.partition(",")
    letters = inputs.replace("...", "")
    flat = squares.reshape(-1, *squares.shape[squares.ndim - len(letters) :])
    shared = "".join(letter for letter in kernel if letter in letters)
    spare = next(item for item in "abcdefghijklmnopqrstuvwxyz" if item not in letters)
    sums = np.einsum(f"{spare}{letters}->{shared}", flat)
    return sums.reshape([sums.shape[shared.index(n)] if n in shared else 1 for n in kernel])


def _of_convolution(layer: Any, oriented: Oriented, squares: np.ndarray) -> np.ndarray:
    """Return sums of shape (kernel positions, inputs, 1), or (.., inputs / groups, units) if grouped."""
    if layer.data_format == "channels_first":
        squares = np.moveaxis(squares, 1, -1)
    sums = _taps(layer, squares.sum(axis=0))
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, DEPTHWISE) or groups == 1:
        return sums[..., None]
    apart = np.moveaxis(sums.reshape(*sums.shape[:-1], groups, -1), -2, -1)
    return apart.repeat(int(oriented.variable.shape[-1]) // groups, axis=-1)


def _taps(layer: Any, squares: np.ndarray) -> np.ndarray:
    """Return, per kernel position and channel, the sum of what that position sees."""
    kernel, strides = tuple(layer.kernel_size), each(layer.strides, len(layer.kernel_size))
    dilation = each(layer.dilation_rate, len(kernel))
    ends = [(size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True)]
    around = list(sides(layer.padding, squares.shape[:-1], ends, strides))
    padded = np.pad(squares, [*around, (0, 0)])
    found = np.zeros((*kernel, squares.shape[-1]))
    for position in itertools.product(*map(range, kernel)):
        cut = []
        for axis, at in enumerate(position):
            count = (padded.shape[axis] - ends[axis]) // strides[axis] + 1
            start = at * dilation[axis]
            cut.append(slice(start, start + strides[axis] * (count - 1) + 1, strides[axis]))
        found[position] = padded[tuple(cut)].sum(axis=tuple(range(len(kernel))))
    return found


def sides(
    padding: str, sizes: tuple[int, ...], ends: list[int], strides: tuple[int, ...]
) -> Iterator[tuple[int, int]]:
    """Yield the zeros before and after, for each axis over positions."""
    for size, end, stride in zip(sizes, ends, strides, strict=True):
        if padding == "causal":
            yield end - 1, 0
            continue
        total = max((-(-size // stride) - 1) * stride + end - size, 0) if padding == "same" else 0
        yield total // 2, total - total // 2


def each(value: Any, axes: int) -> tuple[int, ...]:
    """Return a number for each of the axes, where one number or one for each is given."""
    return (value,) * axes if isinstance(value, int) else tuple(value)
