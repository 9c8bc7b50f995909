"""Calibration sums of one weight at a time: dense outputs regressed on present inputs, for data of any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.reconstruction.least_squares import LeastSquares
from karikomi.torch.internals import version_of
from karikomi.torch.numerics.norms import wide
from karikomi.torch.tracing.batches import Batch, batches_of
from karikomi.torch.tracing.patches import patches
from karikomi.torch.tracing.weight_reads import Reading, WeightReadHooks
from karikomi.torch.tracing.windows import Window


def weight_matrix(weight: torch.Tensor, window: Window | None) -> torch.Tensor:
    """Return a weight as (units, kernel positions x inputs), inputs running fastest, as `patches` gives them.

    >>> weight_matrix(torch.zeros(8, 3, 2, 2), None).shape
    torch.Size([8, 12])
    """
    if window is not None and window.transposed:
        weight = weight.unflatten(0, (window.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.movedim(1, -1).reshape(len(weight), -1)


def matrix_weight(
    matrix: torch.Tensor, shape: tuple[int, ...], window: Window | None
) -> torch.Tensor:
    """Return the weight of a shape whose matrix this is: the inverse of `weight_matrix`.

    >>> matrix_weight(torch.zeros(8, 12), (8, 3, 2, 2), None).shape
    torch.Size([8, 3, 2, 2])
    """
    units, inputs, *kernel = shape
    if window is not None and window.transposed:
        groups = window.groups
        units, inputs = inputs * groups, units // groups
        spread = matrix.reshape(units, *kernel, inputs).movedim(-1, 1)
        return spread.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()
    return matrix.reshape(units, *kernel, inputs).movedim(-1, 1).contiguous()


class _Enough(Exception):
    """All readings of the requested weight are recorded."""


class Regressions:
    """Inputs of weights, now and with the `dense` weights; raises `Unsupported` for a weight that nothing reads.

    `everywhere`: also of recurrent kernels and transposed convolutions, whose matrix is that of `weight_matrix`; a
    weight that nothing reads is then listed in `unread`, with what else reads it. `positions`: how many of a
    convolution's outputs for an example are summed. `rows`: weight name -> how many inputs its regression summed.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, torch.Tensor],
        dense: Mapping[str, torch.Tensor],
        data: Iterable[Any],
        *,
        where: str,
        everywhere: bool = False,
        positions: int | None = None,
    ) -> None:
        self.dense, self._where, self._everywhere = dense, where, everywhere
        self._given: dict[str, Any] = {"transposed": everywhere, "positions": positions}
        self.windows: dict[str, Window | None] = {}
        self.rows: dict[str, int] = {}
        self._ahead: dict[str, list[list[torch.Tensor]]] = {}
        self._entries: dict[str, int] = {}
        self._module, self._parameters, self._data = module, parameters, data
        self._times: dict[str, int] = {}
        self._parts: dict[str, int] = {}
        self._runs: list[list[str]] = []
        self._latest: torch.Tensor | None = None
        with WeightReadHooks(parameters, [self._count], recurrent=everywhere) as watch:
            self._run(next(self._batches()), {})
        self._latest = None
        self._strays = watch.strays
        self.unread = {
            name: watch.strays.get(name, "nothing in the data")
            for name in parameters
            if name not in self._times
        }
        for name in () if everywhere else self.unread:
            raise Unsupported(
                "no linear map or convolution reads this weight, so it cannot be re-fitted",
                where=f"{self._where}: {name}",
                got=watch.strays.get(name, "never read"),
                hint=f"exclude={name!r}",
            )

    @property
    def order(self) -> list[str]:
        """The names in the order of the forward pass."""
        return list(self._times)

    @property
    def strays(self) -> dict[str, str]:
        """Weight name -> another function that read it, beside what was counted."""
        return self._strays

    @property
    def together(self) -> list[list[str]]:
        """The names in the order of the forward pass, those of weights that read the same inputs side by side."""
        alone = [name for run in self._runs for name in run if self._times[name] > 1]
        runs = [[name for name in run if self._times[name] == 1] for run in self._runs]
        found = [run for run in runs if run] + [[name] for name in dict.fromkeys(alone)]
        return sorted(found, key=lambda run: self.order.index(run[0]))

    def problem(self, name: str) -> LeastSquares:
        """Return the regression of the dense outputs on the present inputs, summed over the data."""
        return self.problems([name])[name]

    def problems(self, names: Sequence[str]) -> dict[str, LeastSquares]:
        """Return the regressions of some weights, one pass over the data for all of them.

        Of a weight whose inputs are other ones in the dense network, as of an expert to which a gate sends other
        examples now, the outputs are those of its dense values on the present inputs.
        """
        sums = {name: _Sums() for name in names}
        apart: set[str] = set()
        ready = all(name in self._ahead for name in names)
        for number, batch in enumerate(self._batches()):
            now = self._readings(names, batch, self._parameters)
            if ready:
                then = {name: self._ahead[name][number] for name in names}
            else:
                then = self._dense_outputs(names, batch)
            for name in names:
                after = [reading for reading in now if reading.name == name]
                if name not in apart and not self._add(sums[name], then[name], after):
                    apart.add(name)
        sums |= self._alone(sorted(apart)) if apart else {}
        self.rows |= {name: total.rows for name, total in sums.items()}
        for name in names:
            self._ahead.pop(name, None)
        return {name: total.result() for name, total in sums.items()}

    def look_ahead(self, names: Sequence[str], most: int) -> None:
        """Compute the dense outputs of the first of some weights in one pass, as many as `most` entries hold.

        `problems` takes them from there, instead of a pass of its own through the dense network. Not of data whose
        order may be another one in each pass, as that of a `DataLoader`.
        """
        chosen: list[str] = []
        entries = 0
        for name in names if isinstance(self._data, Sequence) else ():
            entries += self._entries[name] * len(self._data)  # type: ignore[arg-type]
            if entries > most:
                break
            chosen.append(name)
        if len(chosen) > 1:
            self._ahead = {name: [] for name in chosen}
            for batch in self._batches():
                for name, outputs in self._dense_outputs(chosen, batch).items():
                    self._ahead[name].append(outputs)

    def is_ahead(self, name: str) -> bool:
        """Return whether the dense outputs of a weight were computed by `look_ahead`."""
        return name in self._ahead

    def _dense_outputs(self, names: Sequence[str], batch: Batch) -> dict[str, list[torch.Tensor]]:
        """Return weight name -> outputs of its readings in the dense network, block by block."""
        found: dict[str, list[torch.Tensor]] = {name: [] for name in names}

        def keep(reading: Reading) -> None:
            part, parts = reading.part
            for block in patches(reading, **self._given):
                found[reading.name].append(self._dense_product(reading.name, block, part, parts))

        self._read(names, batch, self.dense, keep)
        return found

    def _dense_product(self, name: str, block: torch.Tensor, part: int, parts: int) -> torch.Tensor:
        """Return inputs times the dense values of a weight."""
        matrix = self._matrix_of(name).to(block.dtype)
        whole = matrix.reshape(parts * len(block), -1, block.shape[2])
        return block @ whole[part * len(block) : (part + 1) * len(block)].mT

    def _alone(self, names: Sequence[str]) -> dict[str, _Sums]:
        """Return the sums of the dense values on the present inputs."""
        sums = {name: _Sums() for name in names}
        for batch in self._batches():
            for reading in self._readings(names, batch, self._parameters):
                for block in patches(reading, **self._given):
                    outputs = self._dense_product(reading.name, block, *reading.part)
                    sums[reading.name].add(outputs, block, *reading.part)
        return sums

    def _add(self, sums: _Sums, then: list[torch.Tensor], now: list[Reading]) -> bool:
        """Add the outputs on the inputs, and return True; or False where they are not of the same examples."""
        blocks = [
            (block, reading.part) for reading in now for block in patches(reading, **self._given)
        ]
        if [term.shape[:2] for term in then] != [block.shape[:2] for block, _ in blocks]:
            return False
        for outputs, (block, part) in zip(then, blocks, strict=True):
            sums.add(outputs, block, *part)
        return True

    def grams(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Return weight name -> Gram matrix of its inputs in the dense network, (groups, inputs, inputs), float64."""
        weights = {name: self.dense[name] for name in names}
        found: dict[str, torch.Tensor] = {}

        def add(reading: Reading) -> None:
            part, parts = reading.part
            for block in patches(reading, **self._given):
                product = (block.mT @ block).to(wide(block.device))
                groups = len(product)
                if reading.name not in found:
                    found[reading.name] = product.new_zeros((parts * groups, *product.shape[1:]))
                found[reading.name][part * groups : (part + 1) * groups] += product

        for batch in self._batches():
            with WeightReadHooks(weights, [add], recurrent=self._everywhere):
                self._run(batch, dict(self.dense))
        return {name: gram.double().cpu().numpy() for name, gram in found.items()}

    def gram_entries(self, name: str) -> int:
        """Return the number of entries of the Gram matrix of a weight."""
        width = self._matrix_of(name).shape[1]
        groups, window = self._parts[name], self.windows[name]
        return width * width * (groups if window is None else window.groups)

    def _matrix_of(self, name: str) -> torch.Tensor:
        return weight_matrix(self.dense[name], self.windows[name])

    def _readings(
        self, names: Sequence[str], batch: Batch, weights: Mapping[str, torch.Tensor]
    ) -> list[Reading]:
        readings: list[Reading] = []
        # A copy, since the network may change it in place later.
        self._read(
            names,
            batch,
            weights,
            lambda reading: readings.append(replace(reading, inputs=reading.inputs.clone())),
        )
        return readings

    def _read(
        self,
        names: Sequence[str],
        batch: Batch,
        weights: Mapping[str, torch.Tensor],
        on_read: Callable[[Reading], None],
    ) -> None:
        """Run a batch until all of some weights were read."""
        most = sum(self._times[name] for name in names)
        count = 0

        def read(reading: Reading) -> None:
            nonlocal count
            on_read(reading)
            count += 1
            # A weight that is read several times may be read more often in another batch.
            if most == len(names) == count:
                raise _Enough

        replaced = {} if weights is self._parameters else dict(weights)
        try:
            chosen = {name: weights[name] for name in names}
            with WeightReadHooks(chosen, [read], recurrent=self._everywhere):
                self._run(batch, replaced)
        except _Enough:
            pass

    def _run(self, batch: Batch, weights: dict[str, torch.Tensor]) -> None:
        torch.func.functional_call(self._module, weights, batch.positional, dict(batch.named))

    def _batches(self) -> Iterator[Batch]:
        return batches_of(self._data, self._module, where=f"{self._where}: data")

    def _count(self, reading: Reading) -> None:
        self._times[reading.name] = self._times.get(reading.name, 0) + 1
        self.windows[reading.name] = reading.window
        self._parts[reading.name] = reading.part[1]
        entries = self._entries.get(reading.name, 0)
        self._entries[reading.name] = entries + _outputs_of(reading, self._given["positions"])
        if self._latest is not None and _same(self._latest, reading.inputs):
            self._runs[-1].append(reading.name)
        else:
            self._runs.append([reading.name])
        # Kept, so that no other tensor gets its memory.
        self._latest = reading.inputs


def _outputs_of(reading: Reading, positions: int | None) -> int:
    """Return about how many outputs a reading has, those of some `positions` of a convolution."""
    inputs, window, weight = reading.inputs, reading.window, reading.weight
    if window is None:
        return inputs.numel() // max(inputs.shape[-1], 1) * len(weight) // reading.part[1]
    examples = len(inputs) if inputs.dim() == len(window.kernel) + 2 else 1
    places = math.prod(window.outputs)
    units = weight.shape[1] * window.groups if window.transposed else len(weight)
    return examples * units * min(places, positions or places)


def _same(earlier: torch.Tensor, later: torch.Tensor) -> bool:
    """Return whether two tensors are one, unchanged in between."""
    placed = earlier.data_ptr() == later.data_ptr() and earlier.shape == later.shape
    return placed and version_of(earlier) == version_of(later)


class _Sums:
    """Gram, cross and energy of one weight: products in float32, summed in the widest type."""

    def __init__(self) -> None:
        self._gram = self._cross = torch.zeros(())
        self._energy, self.rows = 0.0, 0

    def add(self, outputs: torch.Tensor, block: torch.Tensor, part: int, parts: int) -> None:
        """Add inputs (groups, samples, inputs) in the present network and the outputs of the same in the dense one."""
        groups, samples, width = block.shape
        if self._gram.dim() == 0:
            of = wide(block.device)
            self._gram = block.new_zeros((parts * groups, width, width), dtype=of)
            self._cross = block.new_zeros((parts * groups, outputs.shape[2], width), dtype=of)
        at = slice(part * groups, (part + 1) * groups)
        self._gram[at] += block.mT @ block
        self._cross[at] += outputs.mT @ block
        self.rows += samples if part == 0 else 0
        self._energy += float(outputs.to(self._gram.dtype).square().sum())

    def result(self) -> LeastSquares:
        """Return the sums as float64 arrays."""
        gram, cross = self._gram.double().cpu().numpy(), self._cross.double().cpu().numpy()
        return LeastSquares(gram, cross, self._energy)
