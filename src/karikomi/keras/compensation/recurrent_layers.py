"""Recurrent layers re-fitted: the sums in front of their gates, on what is left of inputs and last states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from karikomi.keras.arrays.variables import on_host
from karikomi.keras.labelling.kept import KeptWeights
from karikomi.keras.layers.codes import floats_of
from karikomi.keras.reconstruction.recurrent_reads import CELLS
from karikomi.keras.reconstruction.weight_reads import LayerCall
from karikomi.prune.account import error_ratio
from karikomi.reconstruction.affine_fit import AffineFit
from karikomi.shrink.account import Refit
from karikomi.shrink.refit_outcome import CHANGED

ROUNDS = 2
"""The last states are those of the dense layer in the first round, then those of the re-fitted one."""


@dataclass(slots=True)
class _Side:
    """A layer of one model: its inputs (examples, steps, features) in the order of its steps, and its first state."""

    layer: Any
    inputs: np.ndarray
    first: list[Any]

    @classmethod
    def of(cls, layer: Any, call: LayerCall) -> _Side:
        given: Any = keras.ops.convert_to_tensor(call.inputs)
        state = call.options.get("initial_state")
        state = layer.get_initial_state(len(given)) if state is None else state
        inputs = floats_of(given, np.float32)
        turned = inputs[:, ::-1] if layer.go_backwards else inputs
        return cls(layer, turned, list(state) if isinstance(state, list | tuple) else [state])

    def run(self) -> np.ndarray:
        """Return the hidden state before each step and after the last, (examples, steps + 1, units)."""
        state, found = self.first, [floats_of(self.first[0], np.float32)]
        for step in range(self.inputs.shape[1]):
            given = keras.ops.convert_to_tensor(np.ascontiguousarray(self.inputs[:, step]))
            _, state = self.layer.cell(given, state, training=False)
            state = list(state) if isinstance(state, list | tuple) else [state]
            found.append(floats_of(state[0], np.float32))
        return np.stack(found, axis=1)

    @property
    def kernels(self) -> tuple[Any, Any]:
        """The kernels of the inputs and of the states."""
        return self.layer.cell.kernel, self.layer.cell.recurrent_kernel

    @property
    def biases(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The biases of the products of inputs and of states."""
        bias = getattr(self.layer.cell, "bias", None)
        if bias is None:
            return None, None
        numbers = floats_of(bias, np.float32)
        return (numbers[0], numbers[1]) if numbers.ndim == 2 else (numbers, None)


def refit_recurrent_(
    dense: tuple[Any, LayerCall],
    small: tuple[Any, LayerCall],
    stays: KeptWeights,
    held: np.ndarray,
) -> Refit | None:
    """Re-fit both kernels and the bias of a recurrent layer in place; nothing if its inputs and units are as before.

    The sum of the products with inputs and states is regressed on both, of a GRU each product alone.
    """
    layer, call = small
    if type(getattr(layer, "cell", None)) not in CELLS:
        return Refit(why=f"the inputs of {type(layer).__name__} are not read")
    if call.options.get("mask") is not None:
        return Refit(why="its inputs are masked")
    if layer.stateful:
        return Refit(why="it keeps a state between batches")
    sides = _Side.of(*dense), _Side.of(*small)
    fit = _Fit(*sides, stays, held)
    return fit.run_() if fit.changed else None


class _Fit:
    def __init__(self, dense: _Side, small: _Side, stays: KeptWeights, held: np.ndarray) -> None:
        self._dense, self._small, self._held = dense, small, held
        kernel, recurrent = dense.kernels
        self._units = stays.indices(stays.value_of(recurrent), 0)
        self._rows = stays.indices(stays.value_of(kernel), 1)
        self._joint = not isinstance(dense.layer.cell, keras.layers.GRUCell)
        self._full = dense.run()

    @property
    def changed(self) -> bool:
        """Whether units went, or the inputs are others."""
        before, after = self._dense.inputs, self._small.inputs
        if self._full.shape[2] != len(self._units) or before.shape != after.shape:
            return True
        scale = float(np.abs(before).max(initial=0.0)) or 1.0
        return bool(np.abs(before - after).max(initial=0.0) > CHANGED * scale)

    def run_(self) -> Refit:
        """Re-fit, as long as the states of the held-out examples come nearer to the dense ones."""
        expected = self._full[..., self._units]
        states = self._small.run()
        start = best = self._error(expected, states)
        kept, read = self._weights(), expected
        for _ in range(ROUNDS):
            self._solve_(read[:, :-1])
            states = self._small.run()
            error = self._error(expected, states)
            if not error < best:
                break
            best, kept, read = error, self._weights(), states
        for variable, values in zip(self._small.layer.weights, kept, strict=True):
            variable.assign(values)
        return Refit(start, best, best < start)

    def _solve_(self, states: np.ndarray) -> None:
        """Regress on the inputs and these states before each step."""
        fitted = ~self._held
        full = self._dense.inputs[fitted], self._full[fitted, :-1]
        left = self._small.inputs[fitted], states[fitted]
        kernels, biases = self._small.kernels, list(self._small.biases)
        for sides in [(0, 1)] if self._joint else [(0,), (1,)]:
            targets = sum(self._product(full[side], side) for side in sides)
            joint = np.concatenate([left[side] for side in sides], axis=-1)
            wide = np.concatenate([floats_of(kernels[side], np.float32) for side in sides]).T
            sums, has = AffineFit(), biases[sides[0]] is not None
            sums.add(_flat(joint), _flat(np.asarray(targets)))
            new, shifts = sums.solved(
                wide.astype(np.float64), free=has, where=self._small.layer.path
            )
            ends = np.cumsum([kernels[side].shape[0] for side in sides])[:-1]
            for side, part in zip(sides, np.split(new.T, ends), strict=True):
                kernels[side].assign(part)
            if has:
                biases[sides[0]] = shifts
        self._set_(biases)

    def _set_(self, biases: list[np.ndarray | None]) -> None:
        first, second = biases
        if first is not None:
            whole = first if second is None else np.stack([first, second])
            self._small.layer.cell.bias.assign(whole)

    def _product(self, values: np.ndarray, side: int) -> np.ndarray:
        """Return what the gates that stay get from inputs or states in the dense layer."""
        found = values @ floats_of(self._dense.kernels[side], np.float32)[:, self._rows]
        bias = self._dense.biases[side]
        return found if bias is None else found + bias[self._rows]

    def _error(self, expected: np.ndarray, states: np.ndarray) -> float:
        own, other = (array[self._held, 1:].astype(np.float64) for array in (expected, states))
        return error_ratio(float(np.square(own - other).sum()), float(np.square(own).sum()))

    def _weights(self) -> list[np.ndarray]:
        return [on_host(variable) for variable in self._small.layer.weights]


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(1, -1, array.shape[-1])
