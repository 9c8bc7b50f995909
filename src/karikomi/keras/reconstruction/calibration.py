"""Calibration sums of one weight at a time: dense outputs regressed on present inputs, for data of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers

# Registers how inputs are read.
import karikomi.keras.reconstruction.convolution_reads
import karikomi.keras.reconstruction.linear_reads  # noqa: F401
from karikomi.errors import NonFinite
from karikomi.keras.arrays.variables import on_host
from karikomi.keras.facts.layer_calls import batches, run, stood_in
from karikomi.keras.internals import all_layers
from karikomi.keras.layers.codes import as_floats
from karikomi.keras.layers.unit_axes import Weight
from karikomi.keras.reconstruction.recurrent_reads import CELLS
from karikomi.keras.reconstruction.weight_reads import (
    KernelMatrix,
    LayerCall,
    Reader,
    reader_of,
)
from karikomi.reconstruction.least_squares import LeastSquares


@dataclass(frozen=True, slots=True)
class Site:
    """Where the inputs of a variable are seen: a layer, and how it is read."""

    layer: Any
    reader: Reader

    @property
    def matrix(self) -> KernelMatrix:
        """How the variable lies as a matrix."""
        return self.reader.matrix(self.layer)


class Regressions:
    """Inputs of weights, now and with the weights of when this was made, in inference mode.

    `order`: names in the order in which their layers are called. `unread`: name -> why nothing is known about what
    a weight multiplies. `sites`: where the others are.
    """

    def __init__(
        self, model: Any, weights: Mapping[str, Weight], data: Iterable[Any], *, where: str
    ) -> None:
        self._model, self._data, self._where = model, data, where
        self._variables = {name: item.variable for name, item in weights.items()}
        self._dense = {name: on_host(variable) for name, variable in self._variables.items()}
        found, self.unread = _sites(model, weights)
        self.order = self._called(found)
        self.sites = {name: found[name] for name in self.order}
        self.unread |= {name: "its layer was not called" for name in found.keys() - self.sites}

    def problem(self, name: str) -> LeastSquares:
        """Return the regression of the dense outputs on the present inputs, summed over the data.

        Where a layer was called with other shapes than before, its dense outputs are those on the present inputs.
        Raises `NonFinite`.
        """
        found = self._sums(name, alone=False) or self._sums(name, alone=True)
        assert found is not None  # noqa: S101  (the same inputs have the same shapes)
        return found

    def _sums(self, name: str, *, alone: bool) -> LeastSquares | None:
        """Return the regression; None where the inputs are not of the same examples; `alone`: of present inputs."""
        site, sums = self.sites[name], _Sums(self.sites[name].matrix.of(self._dense[name]))
        for inputs, _ in batches(self._data, where=self._where):
            now = then = self._seen(site, inputs)
            if not alone:
                with self._as_before():
                    then = self._seen(site, inputs)
            if [array.shape for array in then] != [array.shape for array in now]:
                return None
            for both in zip(then, now, strict=True):
                blocks = [site.reader.blocks(site.layer, array) for array in both]
                for before, after in zip(*blocks, strict=True):
                    sums.add(before, after)
        return sums.result(f"{self._where}: {name}")

    def _seen(self, site: Site, inputs: Any) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        see = site.reader.seen

        def watched(layer: Any) -> Callable[..., Any]:
            call = layer.call

            def stand_in(*args: Any, **options: Any) -> Any:
                # Before the call, which may change the state of a recurrent layer.
                found.append(see(layer, LayerCall.of(args, options)))
                return call(*args, **options)

            return stand_in

        with stood_in([site.layer], watched):
            self._run(inputs)
        return found

    def _run(self, inputs: Any) -> None:
        """Run the model, and give layers that keep a state between batches the state of before."""
        kept = [
            variable
            for layer in all_layers(self._model)
            if getattr(layer, "stateful", False)
            for variable in keras.tree.flatten(layer.states or ())
        ]
        before = [on_host(variable) for variable in kept]
        run(self._model, inputs)
        for variable, state in zip(kept, before, strict=True):
            variable.assign(state)

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Let the variables have their dense values meanwhile."""
        present = {name: on_host(variable) for name, variable in self._variables.items()}
        changed = [n for n, old in self._dense.items() if not np.array_equal(old, present[n])]
        try:
            for name in changed:
                self._variables[name].assign(self._dense[name])
            yield
        finally:
            for name in changed:
                self._variables[name].assign(present[name])

    def _called(self, sites: Mapping[str, Site]) -> list[str]:
        """Return the names of the sites in the order in which their layers are called first, on the first batch."""
        order: dict[int, None] = {}

        def watched(layer: Any) -> Callable[..., Any]:
            call = layer.call

            def stand_in(*args: Any, **options: Any) -> Any:
                order.setdefault(id(layer))
                return call(*args, **options)

            return stand_in

        every = {id(site.layer): site.layer for site in sites.values()}
        with stood_in(every.values(), watched):
            self._run(next(batches(self._data, where=self._where))[0])
        places = {number: place for place, number in enumerate(order)}
        called = [name for name, site in sites.items() if id(site.layer) in places]
        return sorted(called, key=lambda name: places[id(sites[name].layer)])


class _Sums:
    """Gram, cross and energy of one weight: products in float32, summed in float64."""

    def __init__(self, matrix: np.ndarray) -> None:
        self._matrix = as_floats(matrix).astype(np.float32)
        self._gram: np.ndarray | float = 0.0
        self._cross: np.ndarray | float = 0.0
        self._energy = 0.0

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Add inputs of the dense network, and the same ones in the present one."""
        groups, _, width = after.shape
        rows = self._matrix.reshape(groups, -1, width)
        outputs = before @ rows.swapaxes(1, 2)
        self._gram = self._gram + (after.swapaxes(1, 2) @ after).astype(np.float64)
        self._cross = self._cross + (outputs.swapaxes(1, 2) @ after).astype(np.float64)
        self._energy += float(np.square(outputs, dtype=np.float64).sum())

    def result(self, where: str) -> LeastSquares:
        """Return the sums."""
        gram, cross = np.asarray(self._gram), np.asarray(self._cross)
        if not gram.shape or not (np.isfinite(gram).all() and np.isfinite(cross).all()):
            raise NonFinite("the inputs of this weight are NaN or infinite, or none", where=where)
        return LeastSquares(gram, cross, self._energy)


def _sites(model: Any, weights: Mapping[str, Weight]) -> tuple[dict[str, Site], dict[str, str]]:
    """Return ``(name -> site, name -> why there is none)``."""
    every = all_layers(model)
    # Their layers run on slices that a backend traces, and have no values.
    apart = {
        id(inner)
        for layer in every
        if isinstance(layer, layers.TimeDistributed)
        for inner in all_layers(layer)
    }
    owners = {
        id(layer.cell): layer for layer in every if isinstance(getattr(layer, "cell", None), CELLS)
    }
    found: dict[str, Site] = {}
    unread: dict[str, str] = {}
    for name, weight in weights.items():
        layer = owners.get(id(weight.layer), weight.layer)
        reader = reader_of(layer, weight.variable.name)
        if id(layer) in apart:
            unread[name] = "inside of TimeDistributed"
        elif reader is None:
            unread[name] = f"the inputs of {type(weight.layer).__name__} are not read"
        else:
            found[name] = Site(layer, reader)
    return found, unread
