"""The inputs of recurrent layers, and their states before each step, which their recurrent kernels multiply."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers

from karikomi.keras.reconstruction.weight_reads import (
    Blocks,
    KernelMatrix,
    LayerCall,
    floats,
    in_rows,
    reads,
)

LAYERS = (layers.LSTM, layers.GRU, layers.SimpleRNN, layers.RNN)
CELLS = (layers.LSTMCell, layers.GRUCell, layers.SimpleRNNCell)


def _columns(_: Any) -> KernelMatrix:
    return KernelMatrix((1,), (0,))


def _inputs(_: Any, call: LayerCall) -> np.ndarray:
    values, mask = floats(call.inputs), call.options.get("mask")
    return values if mask is None else values[_kept(mask)]


def _states(layer: Any, call: LayerCall) -> np.ndarray:
    """Return the hidden state before each step that is not masked, from the cell run step by step."""
    sequence: Any = keras.ops.convert_to_tensor(call.inputs)
    state = call.options.get("initial_state")
    if state is None:
        state = layer.states if layer.stateful else layer.get_initial_state(len(sequence))
    state = list(state) if isinstance(state, list | tuple) else [state]
    mask, found = call.options.get("mask"), []
    steps = range(int(sequence.shape[1]))
    for step in reversed(steps) if layer.go_backwards else steps:
        hidden = floats(state[0])
        kept = np.ones(len(hidden), bool) if mask is None else _kept(mask)[:, step]
        found.append(hidden[kept])
        _, after = layer.cell(sequence[:, step], state, training=False)
        state = [_chosen(kept, new, old) for new, old in zip(after, state, strict=True)]
    return np.concatenate(found)


@reads("kernel", _columns, *LAYERS, seen=_inputs)
@reads("recurrent_kernel", _columns, *LAYERS, seen=_states)
def steps(_: Any, values: np.ndarray) -> Blocks:
    """Yield the vectors of all steps. A gate that resets the state before the product reads it unreset here."""
    yield from in_rows(values)


def _chosen(kept: np.ndarray, new: Any, old: Any) -> Any:
    return new if kept.all() else keras.ops.where(kept[:, None], new, old)


def _kept(mask: Any) -> np.ndarray:
    mask = mask[0] if isinstance(mask, list | tuple) else mask
    return np.asarray(keras.ops.convert_to_numpy(mask), bool)
