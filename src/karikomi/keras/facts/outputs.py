"""Facts about what units put out, and which normalisation takes it: followed from layer to layer.

Taken after the normalisation and the activation that directly follow a layer, where zeros come from. An
addition, a product or a change of shape ends the trail: what comes after mixes the units with others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers

from karikomi.errors import Unsupported
from karikomi.keras.facts.layer_calls import numbers
from karikomi.keras.internals import kernel_of
from karikomi.keras.layers.prunable import NORMS, Oriented

_ACTIVATIONS = (
    *(layers.Activation, layers.ReLU, layers.LeakyReLU, layers.PReLU, layers.ELU, layers.Softmax),
)
# In inference they change no value.
_CARRIED = (
    *(layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D),
    *(layers.GaussianDropout, layers.GaussianNoise, layers.AlphaDropout, layers.Identity),
)


@dataclass(frozen=True, slots=True)
class _Path:
    """The `use`-th use of a kernel, and where its output is now."""

    value: Oriented
    use: int
    tensor: Any


class OutputMoments:
    """Shares of zeros, mean magnitudes and deviations per unit, and the norms that follow a kernel.

    Batches are merged as exactly as one (Chan, Golub and LeVeque 1979). `norms`: name of a kernel -> the
    layers that normalise its outputs.
    """

    def __init__(self, wanted: Mapping[int, Oriented], facts: frozenset[str]) -> None:
        self._wanted, self._facts = wanted, facts
        self._open: dict[int, _Path] = {}
        self._latest: dict[int, _Path] = {}
        self._sums: dict[str, tuple[float, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}
        self.norms: dict[str, list[Any]] = {}

    def see(self, layer: Any, args: tuple[Any, ...], result: Any) -> None:
        """Take one call of a layer."""
        value = self._wanted.get(id(kernel_of(layer)))
        before = self._open.get(id(args[0])) if args else None
        if value is not None:
            linear = getattr(layer, "activation", None) in (None, keras.activations.linear)
            self._put(_Path(value, len(self._latest), result), goes_on=linear)
        elif before is not None and isinstance(layer, (*NORMS, *_ACTIVATIONS, *_CARRIED)):
            if isinstance(layer, NORMS):
                known = self.norms.setdefault(before.value.name, [])
                known += [layer] if not any(layer is other for other in known) else []
            after = _Path(before.value, before.use, result)
            self._put(after, goes_on=not isinstance(layer, _ACTIVATIONS))

    def end(self) -> None:
        """Add what this run of the model ended with."""
        for path in self._latest.values() if self._facts else ():
            self._add(path.value.name, _rows(path.value, path.tensor))
        self._open, self._latest = {}, {}

    def result(self) -> dict[str, dict[str, np.ndarray]]:
        """Return fact -> name -> one number per unit."""
        found: dict[str, dict[str, np.ndarray]] = {fact: {} for fact in self._facts}
        for name, (count, zeros, sizes, _, squares) in self._sums.items():
            per = {"zeros": zeros, "output": sizes, "deviation": squares}
            for fact, sums in found.items():
                sums[name] = (
                    np.sqrt(per[fact] / count) if fact == "deviation" else per[fact] / count
                )
        return found

    def _put(self, path: _Path, *, goes_on: bool) -> None:
        # The tensor is kept as long as its number, which another one could bear after it.
        self._latest[path.use] = path
        if goes_on:
            self._open[id(path.tensor)] = path

    def _add(self, name: str, rows: np.ndarray) -> None:
        count, mean = rows.shape[1], rows.mean(axis=1)
        squares = np.square(rows - mean[:, None]).sum(axis=1)
        zeros, sizes = (rows == 0).sum(axis=1), np.abs(rows).sum(axis=1)
        if name in self._sums:
            before, zeros_before, sizes_before, mean_before, squares_before = self._sums[name]
            apart, share = mean - mean_before, count / (before + count)
            zeros, sizes = zeros + zeros_before, sizes + sizes_before
            squares = squares + squares_before + np.square(apart) * (before * share)
            mean, count = mean_before + apart * share, before + count
        self._sums[name] = count, zeros, sizes, mean, squares


def gates(wanted: Mapping[int, Oriented], norms: Mapping[str, list[Any]]) -> dict[str, np.ndarray]:
    """Return name -> the scale of the one normalisation that takes the outputs of a kernel, per unit.

    Raises `Unsupported` naming a kernel that has none, or more than one.
    """
    found = {}
    for item in wanted.values():
        known = norms.get(item.name, [])
        scale = getattr(known[0], "gamma", None) if len(known) == 1 else None
        if (
            scale is None
            or not item.layout
            or math.prod(scale.shape) != item.shape[item.layout.units]
        ):
            raise Unsupported(
                "no one normalisation with a scale per unit takes the outputs of this layer",
                where=f"gate: {item.name}",
                got=", ".join(other.name for other in known) or None,
                hint=f"exclude={item.name!r}, or another score",
            )
        found[item.name] = numbers(scale).reshape(-1)
    return found


def _rows(oriented: Oriented, tensor: Any) -> np.ndarray:
    """Return outputs as (units, samples), units in the order of the kernel's."""
    values = numbers(tensor)
    if isinstance(oriented.layer, layers.EinsumDense):
        operands, _, result = oriented.layer.equation.replace(" ", "").partition("->")
        kernel, named = operands.partition(",")[2], result.replace("...", "")
        first = 0 if result.endswith("...") else values.ndim - len(named)
        axes = [first + named.index(letter) for letter in kernel if letter in named]
        values = np.moveaxis(values, axes, range(len(axes)))
        return values.reshape(math.prod(values.shape[: len(axes)]), -1)
    first = getattr(oriented.layer, "data_format", None) == "channels_first"
    return np.moveaxis(values, 1 if first else -1, 0).reshape(oriented.shape[_units(oriented)], -1)


def _units(oriented: Oriented) -> int:
    return oriented.layout.units if oriented.layout else 0
