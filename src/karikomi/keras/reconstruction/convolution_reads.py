"""The patches of inputs that each output of a convolution sees, plain, grouped, depthwise, separable or transposed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from karikomi.keras.facts.inputs import each, sides
from karikomi.keras.layers.unit_axes import CONVOLUTIONS, DEPTHWISE, SEPARABLE, TRANSPOSED
from karikomi.keras.reconstruction.weight_reads import (
    Blocks,
    KernelMatrix,
    LayerCall,
    floats,
    in_parts,
    in_rows,
    reads,
)

Pairs = list[tuple[int, int]]


def _plain(layer: Any) -> KernelMatrix:
    rank = len(layer.kernel_size)
    return KernelMatrix((rank + 1,), (*range(rank), rank))


def _turned(layer: Any) -> KernelMatrix:
    rank = len(layer.kernel_size)
    return KernelMatrix((rank,), (*range(rank), rank + 1))


def _by_channel(layer: Any) -> KernelMatrix:
    rank = len(layer.kernel_size)
    return KernelMatrix((rank, rank + 1), tuple(range(rank)))


@reads("kernel", _plain, *CONVOLUTIONS)
def convolution(layer: Any, values: np.ndarray) -> Blocks:
    """Yield (groups, samples, kernel positions x channels), channels running fastest."""
    groups = layer.groups
    for block in _windows(layer, _channels_last(layer, values)):
        samples, positions, channels = block.shape
        apart = block.reshape(samples, positions, groups, channels // groups)
        yield np.moveaxis(apart, 2, 0).reshape(groups, samples, -1)


@reads("kernel", _by_channel, *DEPTHWISE)
@reads("depthwise_kernel", _by_channel, *SEPARABLE)
def depthwise(layer: Any, values: np.ndarray) -> Blocks:
    """Yield (channels, samples, kernel positions)."""
    for block in _windows(layer, _channels_last(layer, values)):
        yield np.moveaxis(block, 2, 0)


def _middle(layer: Any, call: LayerCall) -> np.ndarray:
    """Return what the depthwise convolution of a separable one puts out."""
    inputs: Any = keras.ops.convert_to_tensor(call.inputs)
    middle = keras.ops.depthwise_conv(
        inputs,
        keras.ops.cast(layer.depthwise_kernel, inputs.dtype),
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )
    return floats(middle)


@reads("pointwise_kernel", _plain, *SEPARABLE, seen=_middle)
def pointwise(layer: Any, values: np.ndarray) -> Blocks:
    """Yield the channels at each position."""
    yield from in_rows(_channels_last(layer, values))


@reads("kernel", _turned, *TRANSPOSED)
def transposed(layer: Any, values: np.ndarray) -> Blocks:
    """Yield the patches of the inputs with zeros between them, which a plain convolution would see."""
    values = _channels_last(layer, values)
    steps = each(layer.strides, len(layer.kernel_size))
    sizes = [(size - 1) * step + 1 for size, step in zip(values.shape[1:-1], steps, strict=True)]
    spread = np.zeros((len(values), *sizes, values.shape[-1]), np.float32)
    spread[(slice(None), *(slice(None, None, step) for step in steps))] = values
    for block in _patches(
        spread, layer.kernel_size, [1] * len(steps), layer.dilation_rate, _spread_sides(layer)
    ):
        # The first position of the kernel meets the last entry of a patch.
        yield block[:, ::-1].reshape(1, len(block), -1)


def _spread_sides(layer: Any) -> Pairs:
    """Return the zeros before and after, as Keras lays transposed convolutions over their outputs."""
    rank = len(layer.kernel_size)
    sizes = zip(
        layer.kernel_size,
        each(layer.strides, rank),
        each(layer.dilation_rate, rank),
        [None] * rank if layer.output_padding is None else each(layer.output_padding, rank),
        strict=True,
    )
    return [_spread_side(layer.padding, *numbers) for numbers in sizes]


def _spread_side(
    padding: str, size: int, stride: int, dilation: int, more: int | None
) -> tuple[int, int]:
    end = (size - 1) * dilation + 1
    if padding == "valid":
        return end - 1, end - 1 + (max(end, stride) - end if more is None else more)
    total = stride + end - 2 if more is None else end + end % 2 - 2 + more
    before = min(total - total // 2, end - 1)
    return before, total - before


def _windows(layer: Any, values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield (samples, kernel positions, channels) of a plain or depthwise convolution."""
    kernel = tuple(layer.kernel_size)
    strides, dilation = each(layer.strides, len(kernel)), each(layer.dilation_rate, len(kernel))
    ends = [(size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True)]
    around = list(sides(layer.padding, values.shape[1:-1], ends, strides))
    yield from _patches(values, kernel, strides, dilation, around)


def _patches(
    values: np.ndarray, kernel: Any, strides: Any, dilation: Any, around: Pairs
) -> Iterator[np.ndarray]:
    rank = len(kernel)
    steps = each(dilation, rank)
    ends = tuple((size - 1) * step + 1 for size, step in zip(kernel, steps, strict=True))
    places = (slice(None, None, stride) for stride in strides)
    positions = (slice(None, None, step) for step in steps)
    cut = (slice(None), *places, slice(None), *positions)
    for part in in_parts(values, math.prod(values.shape[1:]) * math.prod(kernel)):
        padded = np.pad(part, [(0, 0), *around, (0, 0)])
        seen = np.lib.stride_tricks.sliding_window_view(padded, ends, tuple(range(1, rank + 1)))
        last = np.moveaxis(seen[cut], rank + 1, -1)
        yield last.reshape(math.prod(last.shape[: rank + 1]), math.prod(kernel), last.shape[-1])


def _channels_last(layer: Any, values: np.ndarray) -> np.ndarray:
    return np.moveaxis(values, 1, -1) if layer.data_format == "channels_first" else values
