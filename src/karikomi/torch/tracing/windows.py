"""Windows of a convolution: for each kernel position, the inputs that its weights multiply."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The geometry of one convolution, one number per spatial axis.

    `padding`: at the start and at the end of each axis. `outputs`: how many positions there are. Without axes, and
    transposed, it is a product with a weight of shape (inputs, units): `TURNED`.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    outputs: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @property
    def over(self) -> bool:
        """Whether it is a transposed convolution over some axis."""
        return self.transposed and bool(self.kernel)

    def taps(self, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield, per kernel position in index order, the inputs that it multiplies.

        `inputs`: shape (..., spatial axes). Plain: (..., outputs), with zeros for the padding.
        Transposed: the inputs whose products land inside of the outputs, of varying shape.
        """
        padded = inputs
        if not self.transposed and any(itertools.chain(*self.padding)):
            padded = F.pad(inputs, [side for pair in reversed(self.padding) for side in pair])
        for position in itertools.product(*map(range, self.kernel)):
            sizes = inputs.shape[-len(self.kernel) :]
            cut = [self._cut(axis, at, sizes[axis]) for axis, at in enumerate(position)]
            yield padded[(..., *cut)]

    def _cut(self, axis: int, at: int, size: int) -> slice:
        stride, offset = self.stride[axis], at * self.dilation[axis]
        if not self.transposed:
            return slice(offset, offset + stride * (self.outputs[axis] - 1) + 1, stride)
        # Input i lands on output ``i * stride + shift``.
        shift = offset - self.padding[axis][0]
        first = max(-(shift // stride), 0)
        last = min((self.outputs[axis] - 1 - shift) // stride, size - 1)
        return slice(first, max(last + 1, first))


TURNED = Window(kernel=(), stride=(), padding=(), dilation=(), outputs=(), transposed=True)
"""Of a product ``x @ w``: the transposed convolution of a point, whose inputs and outputs are (samples, features)."""


def window_of(
    weight: torch.Tensor,
    outputs: torch.Tensor,
    *,
    transposed: bool,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Window:
    """Return the window of a convolution from the arguments that torch's functions take."""
    kernel = tuple(weight.shape[2:])
    axes = len(kernel)
    steps = _each(dilation, axes)
    return Window(
        kernel=kernel,
        stride=_each(stride, axes),
        padding=_sides(padding, kernel, steps),
        dilation=steps,
        outputs=tuple(outputs.shape[-axes:]),
        groups=groups,
        transposed=transposed,
    )


def _each(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _sides(padding: Any, kernel: tuple[int, ...], steps: tuple[int, ...]) -> Any:
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [step * (size - 1) for size, step in zip(kernel, steps, strict=True)]
        # An odd total has its extra entry at the end, as in torch.
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((side, side) for side in _each(padding, len(kernel)))
