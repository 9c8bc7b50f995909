"""The tensors of one step, measured and changed in place, for decisions on the host."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from karikomi.errors import Unsupported
from karikomi.rules.decide import StageDecision
from karikomi.rules.outcome import Outcome
from karikomi.rules.stages import PEAKS, RELATIVE, Kind, Stage
from karikomi.torch.clipping.fold import Fold
from karikomi.torch.clipping.second_moments import relative
from karikomi.torch.distributed.dtensors import local, own_units
from karikomi.torch.numerics.norms import norms, on_host, peak
from karikomi.torch.numerics.orders import norms_of, unit_norms_of
from karikomi.torch.numerics.scaling import (
    clamp_,
    finite_,
    representable,
    scale_,
    scale_all_,
    scale_units_,
)

if TYPE_CHECKING:
    from karikomi.torch.clipping.host_step import Clipping


class HostTensors:
    """The tensors of one step, one or ``None`` per parameter of a `Clipping`, for decisions on the host."""

    def __init__(
        self, clipping: Clipping, tensors: Sequence[torch.Tensor | None], scale: float = 1.0
    ) -> None:
        self.clipping = clipping
        self.tensors: list[torch.Tensor | None] = list(tensors)
        self._scale, self._sharding = scale, clipping.sharding

    def second_moments(self, place: int) -> torch.Tensor | None:
        """Return the second moments of the gradient of a parameter."""
        raise NotImplementedError

    def gradient(self, place: int) -> torch.Tensor | None:
        """Return what a norm in units of the second moments is measured of."""
        return self.tensors[place]

    def folded(self, factor: float) -> bool:
        """Return whether the optimizer multiplies all tensors by a factor."""
        return False

    def store(self, place: int, tensor: torch.Tensor) -> None:
        """Put a tensor in the place of another one."""
        self.tensors[place] = tensor

    def discard(self) -> None:
        """Take the tensors out of a step that is skipped."""

    def join_remaining(self, stages: Sequence[Stage]) -> None:
        """Take part in the collectives of stages that are left out here."""
        # Other ranks may run them, if a gradient that should be equal everywhere was not.
        if self._sharding is not None:
            self.tensors = [None] * len(self.tensors)
            for stage in stages:
                self.measure(stage)
                self.facts(stage)

    def measure(self, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of a stage, and which of them are present."""
        tensors = self.tensors
        missing = any(map(operator.is_, tensors, repeat(None)))
        present = np.full(len(tensors), True)
        if missing:
            present = np.array([tensor is not None for tensor in tensors])
        if stage.norms_only:
            chosen: Any = tensors
            if missing:
                chosen = [tensor for tensor in tensors if tensor is not None]
            chosen = chosen if self._sharding is None else [local(item) for item in chosen]
            numbers = norms_of(chosen, stage.order)
            if missing:
                found, numbers = numbers, np.zeros(len(tensors))
                numbers[present] = found
        else:
            numbers = self._mixed(stage.kinds, stage.counts, tensors, stage.order)
            present = np.repeat(present, stage.counts[: len(tensors)])
        if self._sharding is not None:
            numbers, present = self._sharding.combined(stage, numbers, present)
        return numbers if self._scale == 1.0 else numbers / self._scale, present

    def mend(self, stage: Stage, numbers: np.ndarray) -> np.ndarray:
        """Set entries that are not finite to zero, and return the numbers of the stage measured again."""
        pairs = zip(stage.owners, numbers.tolist(), strict=True)
        bad = {name for name, number in pairs if not math.isfinite(number)}
        if not bad:
            return numbers
        for place, name in enumerate(self.clipping.parameters):
            tensor = self.tensors[place]
            if name in bad and tensor is not None:
                self.store(place, finite_(tensor))
        return self.measure(stage)[0]

    def facts(self, stage: Stage) -> dict[str, np.ndarray]:
        """Return the further facts that the rules of a stage need."""
        facts = {}
        if "weights" in stage.needs:
            facts["weights"] = self._weights(stage)
        if "sizes" in stage.needs:
            parameters = list(self.clipping.parameters.values())
            sizes = [p.numel() / n for p, n in zip(parameters, stage.counts, strict=False)]
            sizes += self._sharding.sizes if self._sharding is not None else ()
            facts["sizes"] = np.repeat(sizes, stage.counts)
        return facts

    def representable(self, stage: Stage, decision: StageDecision) -> StageDecision:
        """Return the decision with its limits rounded to the dtypes of the tensors."""
        if decision.limit is None:
            return decision
        tensors = dict(zip(self.clipping.parameters, self.tensors, strict=True))
        limits = [
            limit if (own := tensors.get(name)) is None else representable(limit, own)
            for name, limit in zip(stage.owners, decision.limit.tolist(), strict=True)
        ]
        return decision._replace(limit=np.array(limits, dtype=np.float64))

    def apply(
        self,
        stage: Stage,
        decision: StageDecision,
        outcome: Outcome,
        *,
        skip: np.ndarray,
        last: bool,
    ) -> None:
        """Scale or clamp the tensors in place, unless the step is skipped."""
        if self._sharding is not None:
            self._sharding.check(stage, outcome)
        factor = decision.factor
        if skip or (decision.limit is None and not np.any(factor != 1.0)):
            return
        if stage.single and decision.limit is None and _uniform(factor, self.tensors):
            places = [place for place, tensor in enumerate(self.tensors) if tensor is not None]
            number = float(factor[places[0]])
            if last and self.folded(number):
                return
            chosen: Any = [self.tensors[place] for place in places]
            for place, tensor in zip(places, scale_all_(chosen, number), strict=True):
                self.store(place, tensor)
            return
        self._apply_each(stage, decision, outcome.norms)

    def _mixed(
        self,
        kinds: Sequence[Kind],
        counts: Sequence[int],
        tensors: Sequence[torch.Tensor | None],
        order: float,
    ) -> np.ndarray:
        peaks: dict[int, torch.Tensor] = {}
        plain: dict[int, torch.Tensor] = {}
        vectors: dict[int, np.ndarray] = {}
        # Stages also have numbers for parameters of other ranks, after all of these.
        rows = zip(self.clipping.parameters, tensors, kinds, counts, strict=False)
        for place, (name, tensor, kind, count) in enumerate(rows):
            if tensor is None:
                vectors[place] = np.zeros(count)
            elif kind is Kind.UNITS and name in self.clipping.axes:
                vectors[place] = self._units(name, tensor, order)
            elif kind in PEAKS:
                peaks[place] = peak(self._entries(name, place, tensor, kind))
            elif kind in RELATIVE:
                # At once, since the quotient is a tensor of its own.
                gradient: Any = self.gradient(place)
                vectors[place] = norms([relative(local(gradient), self.second_moments(place))])
            else:
                plain[place] = local(tensor)
        found = dict(zip(plain, norms_of(list(plain.values()), order), strict=True))
        found |= dict(zip(peaks, on_host(list(peaks.values())), strict=True))
        vectors |= {place: np.array([number]) for place, number in found.items()}
        return np.concatenate([vectors[place] for place in range(len(tensors))])

    def _entries(self, name: str, place: int, tensor: torch.Tensor, kind: Kind) -> torch.Tensor:
        entries = local(tensor)
        if entries.is_complex():
            raise Unsupported(
                "complex entries have no order to clamp by",
                where=f"{self.clipping.where}: {name}",
                hint="use a rule by norm",
            )
        return relative(entries, self.second_moments(place)) if kind in RELATIVE else entries

    def _units(self, name: str, tensor: torch.Tensor, order: float) -> np.ndarray:
        axis = self.clipping.axes[name]
        if self._sharding is not None and self._sharding.is_split(tensor):
            return self._sharding.unit_norms(tensor, axis, order)
        return unit_norms_of(_dense(local(tensor)), axis, order).cpu().double().numpy()

    def _weights(self, stage: Stage) -> np.ndarray:
        kinds = [kind if kind is Kind.UNITS else Kind.NORM for kind in stage.kinds]
        weights = list(self.clipping.parameters.values())
        numbers = self._mixed(kinds, stage.counts, weights, stage.order)
        if self._sharding is not None:
            numbers, _ = self._sharding.combined(stage, numbers, np.full(numbers.shape, True))
        self.clipping.weights = Outcome(stage.owners, numbers, numbers, False)
        return numbers

    def _apply_each(self, stage: Stage, decision: StageDecision, numbers: np.ndarray) -> None:
        start = 0
        rows = zip(self.clipping.parameters, self.tensors, stage.kinds, stage.counts, strict=False)
        for place, (name, tensor, kind, count) in enumerate(rows):
            part = slice(start, start + count)
            start = part.stop
            factors, limits = decision.factor[part], decision.limit
            if tensor is None:
                continue
            if decision.bad[part].any():
                # The policy zeroes a bad tensor as a whole or leaves it unchanged as a whole.
                if factors.min() == 0.0:
                    self.store(place, scale_(tensor, 0.0))
            elif count > 1:
                self._scale_units_(place, name, tensor, factors)
            elif factors[0] != 1.0:
                self.store(place, scale_(tensor, float(factors[0])))
            elif limits is not None and not numbers[part][0] <= limits[part][0]:
                # A number that is NaN is that of before its bad entries became zeros.
                moments = self.second_moments(place) if kind is Kind.RELATIVE_PEAK else None
                limit = float(limits[part][0]) * self._scale
                self.store(place, clamp_(tensor, limit, moments))

    def _scale_units_(
        self, place: int, name: str, tensor: torch.Tensor, factors: np.ndarray
    ) -> None:
        if not np.any(factors != 1.0):
            return
        axis = self.clipping.axes[name]
        if self._sharding is not None and self._sharding.is_split(tensor):
            factors = factors[own_units(tensor, axis)]
        self.store(place, scale_units_(tensor, axis, factors))


class GradientTensors(HostTensors):
    """The gradients of the parameters of a `Clipping`."""

    def __init__(self, clipping: Clipping, scale: float, fold: Fold | None) -> None:
        self._parameters = list(clipping.parameters.values())
        super().__init__(clipping, [parameter.grad for parameter in self._parameters], scale)
        self._names = list(clipping.parameters)
        self._fold = None if clipping.keeps_moments else fold

    def second_moments(self, place: int) -> torch.Tensor | None:
        """Return the second moments as of before the step."""
        return self.clipping.moments.of(self._names[place], self._parameters[place])

    def folded(self, factor: float) -> bool:
        """Return whether the step of the optimizer multiplies the gradients."""
        return self._fold is not None and self._fold.take(factor, self._scale)

    def store(self, place: int, tensor: torch.Tensor) -> None:
        """Put a gradient in the place of another one."""
        if tensor is not self.tensors[place]:
            self.tensors[place] = self._parameters[place].grad = tensor

    def discard(self) -> None:
        """Remove the gradients, so that the optimizer changes neither weights nor moments."""
        for parameter in self._parameters:
            parameter.grad = None


def _uniform(factor: np.ndarray, gradients: Sequence[torch.Tensor | None]) -> bool:
    kept = [place for place, gradient in enumerate(gradients) if gradient is not None]
    own = factor if len(kept) == len(factor) else factor[kept]
    return own.size > 0 and bool(np.all(own == own[0]))


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor
