"""Dead units of a model: which can go without a change of its outputs, and where their constants go.

Measured on a copy of the model in which the units that went are zero: so a round sees what the one before
made dead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from keras import layers

from karikomi.keras.arrays.variables import on_host
from karikomi.keras.facts.layer_calls import numbers, run, watched
from karikomi.keras.internals import kernel_of
from karikomi.keras.labelling.contractions import channel_axis
from karikomi.keras.labelling.kept import KeptWeights
from karikomi.keras.labelling.label_run import Call, Propagated, kind_of
from karikomi.keras.layers.prunable import Oriented
from karikomi.keras.layers.unit_axes import CONVOLUTIONS, DEPTHWISE, TRANSPOSED
from karikomi.keras.shrinking.proof import DERIVED
from karikomi.keras.shrinking.rewriting import Copy, fill_
from karikomi.shrink.dead_units import UnitFacts, plan
from karikomi.shrink.labels import Block
from karikomi.shrink.unit_groups import Group, kept_of

EVEN = 1e-6
"""Of the largest magnitude: how far the outputs of a constant unit may be apart from place to place."""

MAKERS = (layers.Dense, layers.EinsumDense, layers.Embedding, *CONVOLUTIONS, *TRANSPOSED)
"""Layers whose units are zero before the bias if the weights that make them are."""

READERS = (layers.Dense, *CONVOLUTIONS, *TRANSPOSED)


@dataclass(slots=True)
class DeadUnits:
    """The search in a model whose labels were propagated with `exact`; `makes`: as `Group` names its members."""

    model: Any
    found: Propagated
    groups: Sequence[Group]
    variables: Mapping[str, Oriented]
    makes: Callable[[Block], bool]
    samples: Sequence[Any]
    left_alone: dict[str, str] = field(default_factory=dict)
    _values: dict[int, np.ndarray] = field(default_factory=dict)

    def numbers(self, variable: Any) -> np.ndarray:
        """Return the numbers of a variable: zero for what went, with constants in the biases."""
        return self._values.get(id(variable), on_host(variable))

    def kept(self) -> np.ndarray:
        """Return a boolean per label: whether it stays."""
        copy, summed = Copy(self.model), self._summed()
        gone: list[np.ndarray] = [np.zeros(0, int)]
        while True:
            fill_(copy.model, self.model, self.numbers)
            readings = self._readings(copy)
            left = {group.name: self._without(group, np.concatenate(gone)) for group in self.groups}
            facts = {
                name: self._facts(group, readings, summed)
                for name, group in left.items()
                if len(group)
            }
            decided = plan(facts)
            self.left_alone = decided.left_alone
            if not decided.removed:
                return kept_of(self.found.classes, gone)
            for name in facts:
                self._fold_(left[name], decided.folded[name], readings)
                gone.append(np.delete(left[name].units, decided.kept[name]))
            stays = KeptWeights(kept_of(self.found.classes, gone), self.found)
            for item in self.variables.values():
                variable = item.variable
                self._values[id(variable)] = stays.zeroed(variable, self.numbers(variable))

    def _summed(self) -> np.ndarray:
        """Return the classes that reach an operation on tensors that sums over them."""
        planes = [
            plane.reshape(-1)
            for call, _ in self.found.calls
            if kind_of(call.operation) in DERIVED
            for value in call.values
            for plane in value.planes
        ]
        return np.unique(self.found.classes.roots[np.concatenate([np.zeros(0, int), *planes])])

    def _without(self, group: Group, gone: np.ndarray) -> Group:
        stay = ~np.isin(group.units, gone)
        members = tuple((block, places[stay]) for block, places in group.members)
        return Group(group.name, group.units[stay], members, group.sites)

    def _facts(
        self, group: Group, readings: Sequence[KernelInput], summed: np.ndarray
    ) -> UnitFacts:
        made, read = np.ones(len(group), bool), np.ones(len(group), bool)
        makers, readers, fixed = 0, 0, None
        heard = [reading for reading in readings if np.isin(group.units, reading.units).any()]
        obstacles = [reading.obstacle for reading in heard if reading.obstacle]
        known = {id(kernel_of(reading.layer)) for reading in heard}
        for block, places in group.members:
            item = self.variables.get(block.owner)
            if item is None or _goes_along(item):
                continue
            zero = _are_zero(self.numbers(item.variable), block.axis, places)
            if self.makes(block) and isinstance(item.layer, MAKERS):
                makers, made = makers + 1, made & zero
            else:
                readers, read = readers + 1, read & zero
                if id(item.variable) not in known:
                    obstacles.append(f"{block.owner} cannot take a constant")
        if not makers and not readers:
            fixed = "no weight makes or reads its units"
        # What is summed without a weight counts in the sum, whatever reads it besides.
        read &= ~np.isin(group.units, summed)
        constants = np.zeros(len(group))
        for reading in heard:
            constants = _largest(constants, np.abs(reading.constants(group.units)))
        return UnitFacts(
            incoming_zero=made if makers else np.zeros(len(group), bool),
            outgoing_zero=read if readers else np.zeros(len(group), bool),
            constants=constants if heard else np.full(len(group), np.nan),
            obstacle=obstacles[0] if obstacles else None,
            fixed=fixed,
        )

    def _readings(self, copy: Copy) -> list[KernelInput]:
        """Return what the layers that multiply by a kernel read, in the copy."""
        calls: dict[int, list[Call]] = {}
        origins = {}
        for call, _ in self.found.calls:
            if isinstance(call.operation, READERS) and call.values:
                twin = copy.layers[id(call.operation)]
                calls.setdefault(id(twin), []).append(call)
                origins[id(twin)] = call.operation
        seen: dict[int, list[np.ndarray]] = {key: [] for key in calls}

        def see(layer: Any, _: Any, args: Any, kwargs: Any, __: Any) -> None:
            if id(layer) in seen:
                seen[id(layer)].append(numbers(args[0] if args else next(iter(kwargs.values()))))

        with watched(copy.model, see):
            for sample in self.samples:
                run(copy.model, sample)
        roots = self.found.classes.roots
        return [
            _reading(origins[key], own, turn, seen[key][turn :: len(own)], roots)
            for key, own in calls.items()
            for turn in range(len(own))
        ]

    def _fold_(self, group: Group, folded: np.ndarray, readings: Sequence[KernelInput]) -> None:
        for reading in readings:
            places = np.flatnonzero(np.isin(reading.units, group.units[folded]))
            if not places.size:
                continue
            kernel, bias = kernel_of(reading.layer), reading.layer.bias
            numbers = self.numbers(kernel).astype(np.float64)
            rows = numbers.reshape(-1, *numbers.shape[-2:]).sum(0)
            added, own = reading.values[places] @ rows[places], self.numbers(bias)
            self._values[id(bias)] = (own + added).astype(own.dtype)


@dataclass(frozen=True, slots=True)
class KernelInput:
    """What a layer reads: per input channel its class, and its value where it is the same everywhere, else NaN."""

    layer: Any
    units: np.ndarray
    values: np.ndarray
    obstacle: str | None

    def constants(self, units: np.ndarray) -> np.ndarray:
        """Return the values of some units, 0 for those that are not read; NaN for one that differs between channels."""
        lowest = np.full(len(units), np.inf)
        highest = -lowest
        for place, unit in enumerate(units):
            own = self.values[self.units == unit]
            if own.size:
                lowest[place], highest[place] = own.min(), own.max()
        read = np.isfinite(lowest) | np.isnan(lowest)
        return np.where(~read, 0.0, np.where(np.abs(highest) > np.abs(lowest), highest, lowest))


def _reading(
    layer: Any, calls: Sequence[Call], turn: int, inputs: Sequence[np.ndarray], roots: np.ndarray
) -> KernelInput:
    """Return what a layer reads in one of its calls."""
    axis = -1 if isinstance(layer, layers.Dense) else channel_axis(layer)
    channels = inputs[0].shape[axis]
    rows = np.concatenate(
        [np.moveaxis(value, axis, 0).reshape(channels, -1) for value in inputs], 1
    )
    middle = rows.mean(1)
    even = np.ptp(rows, 1) <= EVEN * max(float(np.abs(rows).max(initial=0.0)), 1e-30)
    labels = np.full(channels, -1)
    value = calls[turn].values[0]
    rank = len(value.shape)
    for plane in value.planes:
        if plane.shape[axis % rank] > 1 and plane.size == channels:
            labels = roots[plane.reshape(-1)]
    values = np.where(even, np.where(np.abs(middle) < 1e-30, 0.0, middle), np.nan)
    shared = f"{layer.name} is called {len(calls)} times" if len(calls) > 1 else None
    return KernelInput(layer, labels, values, shared or _obstacle(layer))


def _obstacle(layer: Any) -> str | None:
    """Return why the bias of a layer cannot take what its input channels add where they are constant."""
    if layer.bias is None:
        return f"{layer.name} has no bias"
    if isinstance(layer, layers.Dense):
        return None
    if isinstance(layer, TRANSPOSED) or layer.groups > 1:
        return f"{layer.name} adds it to some places only"
    if layer.padding != "valid" and any(size > 1 for size in layer.kernel_size):
        return f"{layer.name} pads with zeros"
    return None


def _goes_along(item: Oriented) -> bool:
    """Return whether a variable only scales, shifts or filters units one by one."""
    vector = len(item.variable.shape) < 2 or (
        item.layout is not None and item.layout.inputs is None
    )
    return vector or isinstance(item.layer, DEPTHWISE) or "depthwise" in item.variable.name


def _are_zero(numbers: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """Return for each unit whether all its entries are zero; `places`: its indices along the axis."""
    others = tuple(other for other in range(numbers.ndim) if other != axis)
    return ~(numbers != 0).any(axis=others)[places].any(axis=1)


def _largest(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the larger of two numbers each, NaN where any is."""
    return np.where(np.isnan(first) | np.isnan(second), np.nan, np.maximum(first, second))
