"""Inputs of a unit's weights, as rows of a matrix in the order of `karikomi.prune.Layout.canonical`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from karikomi.errors import Unsupported
from karikomi.torch.tracing.weight_reads import Reading
from karikomi.torch.tracing.windows import Window

ENTRIES = 1 << 22
"""Number of patch entries in memory at a time, or those of one example if more."""


def patches(
    reading: Reading, *, transposed: bool = False, positions: int | None = None
) -> Iterator[torch.Tensor]:
    """Yield the inputs of one reading as (groups, samples, kernel positions x inputs), some at a time.

    A unit's outputs without bias are ``patches @ w`` with w its weights in the same order, inputs running
    fastest, as for n:m. float32, or float64 for float64 inputs. `transposed`: a transposed convolution is read as
    the plain one of its inputs with zeros between them; else it raises `Unsupported`. `positions`: of a convolution's
    outputs for an example, so many are taken, the same in each call; ``None``: all.
    """
    inputs, window = reading.inputs, reading.window
    inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
    if window is None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        yield from (block[None] for block in rows.split(max(ENTRIES // max(rows.shape[1], 1), 1)))
        return
    if window.over and not transposed:
        raise Unsupported(
            "a transposed convolution cannot be reconstructed",
            where=reading.name,
            hint=f"exclude={reading.name!r}",
        )
    if inputs.dim() == len(window.kernel) + 1:
        inputs = inputs[None]
    entries = inputs.shape[1] * math.prod(window.kernel) * math.prod(window.outputs)
    for number, block in enumerate(inputs.split(max(ENTRIES // max(entries, 1), 1))):
        # Channels last, so that the concatenation copies contiguous runs.
        last = block.unflatten(1, (window.groups, -1)).movedim((1, 2), (0, -1)).contiguous()
        taps = [tap.movedim(2, -1) for tap in _taps(window, last.movedim(-1, 2))]
        if positions is not None and positions < math.prod(window.outputs):
            order = torch.randperm(
                math.prod(window.outputs), generator=torch.Generator().manual_seed(number)
            )
            places = torch.unravel_index(order[:positions].to(inputs.device), window.outputs)
            taps = [tap[(slice(None), slice(None), *places)] for tap in taps]
        yield torch.cat(taps, dim=-1).flatten(1, -2)


def _taps(window: Window, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield, per kernel position, the inputs (..., outputs) that it multiplies, also of a transposed convolution."""
    if not window.over:
        yield from window.taps(inputs)
        return
    axes = range(len(window.kernel))
    sizes = inputs.shape[-len(window.kernel) :]
    spread = inputs.new_zeros(
        (*inputs.shape[: -len(sizes)], *((sizes[i] - 1) * window.stride[i] + 1 for i in axes))
    )
    spread[(..., *(slice(None, None, window.stride[i]) for i in axes))] = inputs
    # Output o takes input o + padding - position * dilation of the spread ones.
    before = [window.dilation[i] * (window.kernel[i] - 1) for i in axes]
    after = [
        max(window.outputs[i] + window.padding[i][0] - spread.shape[i - len(sizes)], 0)
        for i in axes
    ]
    spread = F.pad(spread, [side for i in reversed(axes) for side in (before[i], after[i])])
    for position in itertools.product(*map(range, window.kernel)):
        starts = [before[i] + window.padding[i][0] - position[i] * window.dilation[i] for i in axes]
        cut = (slice(start, start + window.outputs[i]) for i, start in enumerate(starts))
        yield spread[(..., *cut)]
