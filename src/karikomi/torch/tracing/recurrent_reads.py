"""The inputs of the weights of recurrent layers, of each step: those of the layer, and its states before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

LAYERS = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
CELLS = {"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}


def recurrent_inputs(
    func: Any, called: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``(weight, inputs)`` of a call of a recurrent layer or cell; inputs: (rows, features), a row per step.

    The layers of a stack are run one by one to see what is between them. The projection of an LSTM's outputs is
    not among the weights: what it reads does not leave the kernel.
    """
    if called in CELLS:
        cell: Any = args[:4]
        state = cell[1][0] if isinstance(cell[1], tuple | list) else cell[1]
        yield cell[2], cell[0].reshape(-1, cell[0].shape[-1])
        yield cell[3], state.reshape(-1, state.shape[-1])
    elif called in LAYERS and not kwargs:
        packed = isinstance(args[3], list | tuple)
        yield from _stack(func, args if packed else (args[0], None, *args[1:]), batches=packed)


def _stack(func: Any, args: tuple[Any, ...], *, batches: bool) -> Iterator[Any]:
    inputs, sizes, hidden, weights, biased, layers, _, _, both, *rest = args
    first = bool(rest and rest[0])
    states = hidden if isinstance(hidden, tuple | list) else (hidden,)
    directions = 2 if both else 1
    each = len(weights) // (layers * directions)
    for layer in range(layers):
        at = slice(layer * directions, (layer + 1) * directions)
        own = weights[at.start * each : at.stop * each]
        start = tuple(state[at] for state in states)
        given = start if isinstance(hidden, tuple | list) else start[0]
        before = (inputs, sizes) if batches else (inputs,)
        call = (*before, given, own, biased, 1, 0.0, False, both, *rest)
        outputs = func(*call)[0]
        parts = outputs.chunk(directions, dim=-1)
        for direction in range(directions):
            kernels = own[direction * each : direction * each + 2]
            yield kernels[0], inputs.reshape(-1, inputs.shape[-1])
            h0 = start[0][direction]
            previous = _previous(parts[direction], h0, sizes, first, backwards=direction == 1)
            yield kernels[1], previous
        inputs = outputs


def _previous(
    outputs: torch.Tensor,
    start: torch.Tensor,
    sizes: torch.Tensor | None,
    batch_first: bool,
    *,
    backwards: bool,
) -> torch.Tensor:
    """Return the state before each step as rows; `start`: (batch, features), or (features,) without a batch."""
    if sizes is None:
        steps = outputs.transpose(0, 1) if batch_first and outputs.dim() > 2 else outputs
        first = start.reshape(1, *steps.shape[1:])
        shifted = [steps[1:], first] if backwards else [first, steps[:-1]]
        return torch.cat(shifted).reshape(-1, outputs.shape[-1])
    rows = outputs.split(sizes.tolist())
    found = []
    for step, row in enumerate(rows):
        if backwards:
            later = rows[step + 1] if step + 1 < len(rows) else row[:0]
            found.append(torch.cat([later, start[len(later) : len(row)]]))
        else:
            found.append(rows[step - 1][: len(row)] if step else start[: len(row)])
    return torch.cat(found)
