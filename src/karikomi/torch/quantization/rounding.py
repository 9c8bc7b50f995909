"""One request to quantize, carried out on the tensors of a module: vectors first, then weights in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from karikomi.errors import InvalidArgument
from karikomi.quantize import (
    Coded,
    Grid,
    OutputUnits,
    UniformGrid,
)
from karikomi.quantize.code_lengths import coded_bits
from karikomi.quantize.error_feedback import Lattice
from karikomi.quantize.every_tensor import Eligible, vector_codes
from karikomi.quantize.method import Method
from karikomi.quantize.mixed_widths import mixed_widths
from karikomi.quantize.step_search import StepSearch, narrowed
from karikomi.quantize.steps import UNSEEN
from karikomi.quantize.units import to_rows
from karikomi.torch.facts.gradients import Loss
from karikomi.torch.facts.measure import check_data, check_rereadable
from karikomi.torch.modules import codes
from karikomi.torch.quantization.compensated import Compensation, row_importance
from karikomi.torch.quantization.curvature import squared_gradients
from karikomi.torch.quantization.eligible import embeddings
from karikomi.torch.quantization.output_units import output_units
from karikomi.torch.tracing.eval_mode import steady

PASSES, NEAR = 3, 0.02
"""A rate is met within two hundredths, or after so many passes over all layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for: `size` bits or entries, or a `rate`, by a quantizer, on `data`."""

    quantizer: Any
    size: int | float | None
    rate: float | None
    data: Iterable[Any] | None
    where: str

    @classmethod
    def of(
        cls,
        *,
        bits: int | float | None,
        entries: int | None,
        rate: float | None,
        method: Any,
        data: Iterable[Any] | None,
        options: Mapping[str, Any],
        where: str,
    ) -> Request:
        """Return the request of the arguments of `quantize_`; raises as that does."""
        sizes = {"bits": bits, "entries": entries, "rate": rate}
        found = Method.of(method, sizes, options, data=data is not None, where=where)
        if data is not None:
            check_data(data, where)
            check_rereadable(data, where)
        elif isinstance(bits, float):
            raise InvalidArgument(
                "a mean width gives each tensor its own, by its curvature, and needs data",
                where=where,
                got=f"bits={bits}",
                hint="pass data=, an iterable of batches, or a whole number of bits",
            )
        size = found.size if found.rate is None else None
        return cls(quantizer=found.quantizer, size=size, rate=found.rate, data=data, where=where)


class Rounding:
    """The tensors of a module on their way to grids; `notes` as in `Codes`."""

    def __init__(
        self,
        module: nn.Module,
        found: Eligible[torch.Tensor],
        tensors: Mapping[str, torch.Tensor],
        dense: Mapping[str, torch.Tensor],
        request: Request,
        *,
        loss: Loss | None,
        seed: int,
        progress: bool,
    ) -> None:
        self._module, self._request, self._dense = module, request, dense
        self._loss, self._seed, self._progress = loss, seed, progress
        self._tensors = tensors
        self._weights = {name: item for name, item in tensors.items() if name in found.weights}
        self._variances = found.variances
        self._units = output_units(module)
        self.notes: dict[str, str] = {}

    def run_(self) -> dict[str, Coded]:
        """Round all tensors in place and return their codes."""
        vectors = {name: self._vector(name) for name in self._tensors if name not in self._weights}
        # First: the layers that are rounded later see them.
        self._put_(vectors)
        if not self._weights:
            return vectors
        with steady(self._module):
            if self._request.rate is None:
                weights = self._at_size_()
            else:
                weights = self._at_rate_(self._request.rate, vectors)
        return {**vectors, **weights}

    def _vector(self, name: str) -> Coded:
        return vector_codes(
            _array(self._dense[name]),
            variances=name in self._variances,
            coarse=self._request.rate is not None,
            name=name,
        )

    def _at_size_(self) -> dict[str, Coded]:
        quantizer = self._request.quantizer
        weighted = getattr(quantizer, "weighted", False) and self._request.data is not None
        mixed = isinstance(self._request.size, float) and quantizer.argument == "bits"
        curvature = self._curvature() if weighted or mixed else {}
        sizes = (
            self._widths(curvature) if mixed else dict.fromkeys(self._weights, self._request.size)
        )
        coded = {}
        for name in self._weights:
            units = self._units.get(name, OutputUnits())
            array = _array(self._dense[name])
            more = {"importance": _array(curvature[name])} if weighted else {}
            coded[name] = quantizer.quantize(array, sizes[name], units=units, name=name, **more)
        if not getattr(quantizer, "needs", None):
            self._put_(coded)
            return coded
        compensation = self._compensation()
        self._put_({name: tensor for name, tensor in coded.items() if name in compensation.unread})
        grids = {name: tensor.grid for name, tensor in coded.items()}
        return {**coded, **self._compensate_(compensation, grids, {})}

    def _widths(self, curvature: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Return the width of each weight for a mean that is no whole number."""
        weighted = {}
        for name, square in curvature.items():
            rows = to_rows(_array(self._dense[name]), self._units.get(name, OutputUnits()))
            peaks = np.abs(rows).max(1, initial=0.0).astype(np.float64)
            weighted[name] = float(square.double().mean()) * float(np.mean(peaks**2))
        numbers = {name: weight.numel() for name, weight in self._weights.items()}
        mean = float(self._request.size or 0)
        return mixed_widths(weighted, numbers, mean, where=self._request.where)

    def _at_rate_(self, rate: float, vectors: Mapping[str, Coded]) -> dict[str, Coded]:
        quantizer = self._request.quantizer
        compensation = self._compensation() if getattr(quantizer, "needs", None) else None
        curvature = self._curvature()
        search = StepSearch(
            ((name, _on_host(self._dense[name])) for name in self._weights),
            {name: _on_host(square) for name, square in curvature.items()},
            compensation.spreads(quantizer.damping) if compensation else {},
            embeddings(self._module),
            fixed=sum(coded_bits(item.codes) for item in vectors.values()),
            numbers=sum(item.numel() for item in self._tensors.values()),
            seed=self._seed,
        )
        factor = search.factor_at(rate, where=self._request.where)
        found: dict[str, Coded] = {}
        for number in range(PASSES if compensation else 1):
            if number:
                for name in self._weights:
                    self._weights[name].copy_(self._dense[name])
            grids = search.grids(factor)
            alone = compensation.unread if compensation else self._weights
            found = {n: self._alone(n, grids[n], curvature.get(n)) for n in alone}
            self._put_(found)
            if compensation:
                found |= self._compensate_(compensation, grids, curvature)
            now = search.rate_of(found)
            if abs(now - rate) <= NEAR * rate:
                break
            factor *= search.correction(factor, now - rate)
        return {name: narrowed(item) for name, item in found.items()}

    def _alone(self, name: str, grid: UniformGrid, curvature: torch.Tensor | None) -> Coded:
        """Return the codes of a weight whose inputs are not seen, as that of an embedding."""
        array, quantizer = _array(self._dense[name]), self._request.quantizer
        rows = array.reshape(len(array), -1).astype(np.float64)
        lattice = Lattice(grid.scale.astype(np.float64)[:, None], -grid.limit, grid.limit)
        codes = lattice.nearest(rows)
        # With steps of their own, rows are of equal importance.
        if hasattr(quantizer, "alone") and curvature is not None and grid.axis is None:
            codes = quantizer.alone(rows, lattice, row_importance(curvature, None, least=UNSEEN))
        return Coded(codes.reshape(array.shape).astype(grid.code_dtype), grid)

    def _compensation(self) -> Compensation:
        compensation = Compensation(
            self._module,
            self._weights,
            self._dense,
            self._request.data or (),
            progress=self._progress,
            where=self._request.where,
        )
        self.notes |= {name: f"nearest values: {why}" for name, why in compensation.unread.items()}
        return compensation

    def _compensate_(
        self,
        compensation: Compensation,
        grids: Mapping[str, Grid],
        curvature: Mapping[str, torch.Tensor],
    ) -> dict[str, Coded]:
        found, notes = compensation.round_(self._request.quantizer, grids, curvature)
        self.notes |= notes
        return found

    def _curvature(self) -> dict[str, torch.Tensor]:
        if self._request.data is None:
            return {}
        return squared_gradients(
            self._module,
            self._weights,
            self._request.data,
            self._loss,
            seed=self._seed,
            progress=self._progress,
            where=self._request.where,
        )

    def _put_(self, coded: Mapping[str, Coded]) -> None:
        for name, tensor in coded.items():
            self._tensors[name].copy_(codes.decoded(tensor, self._tensors[name].dtype))


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()


def _on_host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
