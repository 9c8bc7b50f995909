"""Inputs of a unit's weights, as rows of a matrix in the order of `karikomi.prune.Layout.canonical`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from karikomi.errors import Unsupported
from karikomi.torch.tracing.weight_reads import Reading

ENTRIES = 1 << 22
"""Number of patch entries in memory at a time, or those of one example if more."""


def patches(reading: Reading) -> Iterator[torch.Tensor]:
    """Yield the inputs of one reading as (groups, samples, kernel positions x inputs), some at a time.

    A unit's outputs without bias are ``patches @ w`` with w its weights in the same order, inputs running
    fastest, as for n:m. float32, or float64 for float64 inputs. Raises `Unsupported` for a transposed
    convolution, where an output is not the product of one patch.
    """
    inputs, window = reading.inputs, reading.window
    inputs = inputs if inputs.dtype == torch.float64 else inputs.float()
    if window is None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        yield from (block[None] for block in rows.split(max(ENTRIES // max(rows.shape[1], 1), 1)))
        return
    if window.transposed:
        raise Unsupported(
            "a transposed convolution cannot be reconstructed",
            where=reading.name,
            hint=f"exclude={reading.name!r}",
        )
    if inputs.dim() == len(window.kernel) + 1:
        inputs = inputs[None]
    entries = inputs.shape[1] * math.prod(window.kernel) * math.prod(window.outputs)
    for block in inputs.split(max(ENTRIES // max(entries, 1), 1)):
        # Channels last, so that the concatenation copies contiguous runs.
        last = block.unflatten(1, (window.groups, -1)).movedim((1, 2), (0, -1)).contiguous()
        taps = [tap.movedim(2, -1) for tap in window.taps(last.movedim(-1, 2))]
        yield torch.cat(taps, dim=-1).flatten(1, -2)
