"""Calibration sums of one weight at a time: dense outputs regressed on present inputs, for data of any size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.reconstruction.least_squares import LeastSquares
from karikomi.torch.numerics.norms import wide
from karikomi.torch.tracing.batches import Batch, batches_of
from karikomi.torch.tracing.patches import patches
from karikomi.torch.tracing.weight_reads import Reading, WeightReadHooks


class _Enough(Exception):
    """All readings of the requested weight are recorded."""


class Regressions:
    """Inputs of weights, now and with the `dense` weights; raises `Unsupported` for a weight that nothing reads."""

    def __init__(
        self,
        module: nn.Module,
        parameters: Mapping[str, torch.Tensor],
        dense: Mapping[str, torch.Tensor],
        data: Iterable[Any],
        *,
        where: str,
    ) -> None:
        self.dense, self._where = dense, where
        self._module, self._parameters, self._data = module, parameters, data
        self._times: dict[str, int] = {}
        with WeightReadHooks(parameters, [self._count]) as watch:
            self._run(next(self._batches()), {})
        for name in parameters.keys() - self._times.keys():
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

    def problem(self, name: str) -> LeastSquares:
        """Return the regression of the dense outputs on the present inputs, summed over the data."""
        sums = _Sums(self.dense[name])
        for batch in self._batches():
            then = self._readings(name, batch, self.dense)
            now = self._readings(name, batch, self._parameters)
            if [term.inputs.shape for term in then] != [current.inputs.shape for current in now]:
                raise Unsupported(
                    "the inputs of this weight changed shape when other weights were pruned",
                    where=f"{self._where}: {name}",
                    hint=f"exclude={name!r}",
                )
            for pair in zip(then, now, strict=True):
                sums.add(*pair)
        return sums.result()

    def _readings(
        self, name: str, batch: Batch, weights: Mapping[str, torch.Tensor]
    ) -> list[Reading]:
        readings: list[Reading] = []

        def keep(reading: Reading) -> None:
            # A copy, since the network may change it in place later.
            readings.append(replace(reading, inputs=reading.inputs.clone()))
            if self._times[name] == 1:
                raise _Enough

        replaced = {} if weights is self._parameters else dict(weights)
        try:
            with WeightReadHooks({name: weights[name]}, [keep]):
                self._run(batch, replaced)
        except _Enough:
            pass
        return readings

    def _run(self, batch: Batch, weights: dict[str, torch.Tensor]) -> None:
        torch.func.functional_call(self._module, weights, batch.positional, dict(batch.named))

    def _batches(self) -> Iterator[Batch]:
        return batches_of(self._data, self._module, where=f"{self._where}: data")

    def _count(self, reading: Reading) -> None:
        self._times[reading.name] = self._times.get(reading.name, 0) + 1


class _Sums:
    """Gram, cross and energy of one weight: products in float32, summed in the widest type."""

    def __init__(self, dense: torch.Tensor) -> None:
        self._matrix = dense.movedim(1, -1).reshape(len(dense), -1)
        self._gram = self._cross = torch.zeros(())
        self._energy = 0.0

    def add(self, then: Reading, now: Reading) -> None:
        """Add one reading in the dense network and the same reading in the present one."""
        part, parts = now.part
        for before, after in zip(patches(then), patches(now), strict=True):
            groups, _, width = after.shape
            if self._gram.dim() == 0:
                matrix = self._matrix.to(after.dtype).reshape(parts * groups, -1, width)
                self._matrix, of = matrix, wide(after.device)
                self._gram = after.new_zeros((parts * groups, width, width), dtype=of)
                self._cross = torch.zeros_like(matrix, dtype=of)
            at = slice(part * groups, (part + 1) * groups)
            outputs = before @ self._matrix[at].mT
            self._gram[at] += after.mT @ after
            self._cross[at] += outputs.mT @ after
            self._energy += float(outputs.to(self._gram.dtype).square().sum())

    def result(self) -> LeastSquares:
        """Return the sums as float64 arrays."""
        gram, cross = self._gram.double().cpu().numpy(), self._cross.double().cpu().numpy()
        return LeastSquares(gram, cross, self._energy)
