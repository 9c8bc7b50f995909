"""Clipping steps without a host sync, for fused optimizers: measured, decided and folded on the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from karikomi.rule import Scope
from karikomi.rules.decide import StageDecision
from karikomi.rules.outcome import Outcome
from karikomi.rules.stages import PEAKS, RELATIVE, Kind, Stage
from karikomi.torch.clipping.fold import Fold, foldable, fused
from karikomi.torch.clipping.host_step import Clipping
from karikomi.torch.clipping.second_moments import relative
from karikomi.torch.numerics import norms
from karikomi.torch.numerics.namespace import DeviceNamespace
from karikomi.torch.numerics.orders import at_once, norm_of, unit_norms_of
from karikomi.torch.numerics.scaling import clamp_, finite_, scale_one_, scale_units_

_PATTERNS = 16  # the most masks of missing gradients that are kept on the device


class HostView:
    """Numbers on a device that are copied to the host on first read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @cached_property
    def _moved(self) -> np.ndarray:
        return self.tensor.cpu().numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._moved.astype(dtype or np.float64)

    def __bool__(self) -> bool:
        return bool(self._moved)


class DeviceStep:
    """The steps of one `Clipping` whose gradients are all on one device, for a fused optimizer.

    `before`: of other parameters, whose counts of steps go on.
    """

    def __init__(
        self,
        clipping: Clipping,
        optimizer: torch.optim.Optimizer,
        before: DeviceStep | None = None,
    ) -> None:
        self._clipping, self._optimizer = clipping, optimizer
        device = next(iter(clipping.parameters.values())).device
        self._xp = DeviceNamespace(device, norms.wide(device))
        parts = [part for stage in clipping.stages for part in stage.parts]
        self._members = {
            part.key: self._xp.asarray(part.members) for part in parts if part.members is not None
        }
        entries = [parameter.numel() for parameter in clipping.parameters.values()]
        self._sizes = {
            stage.counts: self._xp.asarray(
                np.repeat(np.divide(entries, stage.counts), stage.counts)
            )
            for stage in clipping.stages
            if "sizes" in stage.needs
        }
        self._uniform = all(p.rule.scope is Scope.GLOBAL and p.members is None for p in parts)
        self._counts = self._xp.asarray(np.zeros(3, dtype=np.int64))
        if before is not None:
            self._counts = before._counts.to(device)
        self._masks: dict[Any, torch.Tensor] = {}
        self._scale: torch.Tensor | None = None
        self._factor = self._xp.asarray(1.0)

    @staticmethod
    def possible(clipping: Clipping, optimizers: Sequence[torch.optim.Optimizer]) -> bool:
        """Return whether the steps of these optimizers can be taken without the host."""
        tensors = list(clipping.parameters.values())
        return (
            len(optimizers) == 1
            and foldable(optimizers[0])
            and clipping.sharding is None
            and clipping.nonfinite == "skip"
            and len({tensor.device for tensor in tensors}) == 1
            and not norms.on_cpu(tensors[0])
            # Without float64 the norm of finite numbers may overflow, which only the host can detect.
            and norms.wide(tensors[0].device) is torch.float64
            and not any(tensor.is_complex() for tensor in tensors)
        )

    def ready(self) -> bool:
        """Return whether the coming step can be skipped on the device without harm."""
        optimizer = self._optimizer
        if not fused(optimizer):
            return False
        # A fused SGD makes its momentum in the first step, and if that is skipped leaves it unwritten.
        return all(
            optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
            for group in optimizer.param_groups
            if group.get("momentum")
            for parameter in group["params"]
            if parameter.grad is not None
        )

    def step(self, fold: Fold) -> Outcome:
        """Clip the gradients of one step."""
        clipping = self._clipping
        self._scale = scale = getattr(self._optimizer, "grad_scale", None)
        self._factor = self._xp.asarray(1.0)
        overflow = getattr(self._optimizer, "found_inf", None)
        done = clipping.run_on_device(
            self,
            self._xp,
            overflow=None if overflow is None else overflow > 0,
            members=self._members,
            view=HostView,
        )
        inverse = None
        if self._uniform:
            inverse = 1.0 / self._factor
            inverse = inverse if scale is None else inverse * scale.to(inverse.dtype)
            inverse = inverse.clamp(max=torch.finfo(torch.float32).max).to(torch.float32)
        fold.set(inverse, done.skip.to(torch.float32))
        if clipping.keeps_moments:
            clipping.moments.follow(clipping.parameters, skip=done.skip, scale=scale)
        self._count(done.outcomes, done.skip)
        return done.outcomes[-1]

    def counts(self) -> torch.Tensor:
        """Return bad steps in a row, and of the steps taken here the accepted and the engaged ones."""
        return self._counts

    def _count(self, outcomes: Sequence[Outcome], skipped: torch.Tensor) -> None:
        changed = [torch.any(outcome.after.tensor != outcome.norms.tensor) for outcome in outcomes]
        taken = (~skipped).to(torch.int64)
        engaged = torch.any(torch.stack(changed)).to(torch.int64) * taken
        before = self._counts
        bad = self._clipping.bad_in_a_row
        self._counts = torch.stack([bad, before[1] + taken, before[2] + engaged])

    def measure(self, stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the numbers of a stage, and which of them are present."""
        gradients = [parameter.grad for parameter in self._clipping.parameters.values()]
        present = self._present(stage, tuple(gradient is not None for gradient in gradients))
        dense = [gradient for gradient in gradients if gradient is not None]
        if not dense or not stage.norms_only:
            numbers = torch.cat(self._mixed(stage, gradients))
        else:
            wide = norms.wide(present.device)
            sizes = iter(at_once(dense, wide, stage.order))
            zero = self._xp.asarray(0.0)
            numbers = torch.stack([zero if g is None else next(sizes) for g in gradients])
        scale = self._scale
        return numbers if scale is None else numbers / scale.to(numbers.dtype), present

    def mend(self, stage: Stage, numbers: torch.Tensor) -> torch.Tensor:
        """Set entries that are not finite to zero, and return the numbers of the stage measured again."""
        for parameter in self._clipping.parameters.values():
            if parameter.grad is not None:
                parameter.grad = finite_(parameter.grad)
        return self.measure(stage)[0]

    def facts(self, stage: Stage) -> dict[str, torch.Tensor]:
        """Return the further facts that the rules of a stage need."""
        facts = {}
        if "sizes" in stage.needs:
            facts["sizes"] = self._sizes[stage.counts]
        if "weights" in stage.needs:
            weights = [parameter.detach() for parameter in self._clipping.parameters.values()]
            facts["weights"] = torch.cat(self._mixed(stage, weights))
        return facts

    def representable(self, stage: Stage, decision: StageDecision) -> StageDecision:
        """Return the decision as it is: a clamp on a device rounds its limit itself."""
        return decision

    def apply(
        self,
        stage: Stage,
        decision: StageDecision,
        outcome: Outcome,
        *,
        skip: torch.Tensor,
        last: bool,
    ) -> None:
        """Scale or clamp the gradients, or multiply the factor that the optimizer is given."""
        if self._uniform:
            self._factor = self._factor * decision.factor[0]
            return
        start = 0
        rows = zip(self._clipping.parameters.items(), stage.kinds, stage.counts, strict=True)
        for (name, parameter), kind, count in rows:
            factors = decision.factor[start : start + count]
            gradient = parameter.grad
            if gradient is None:
                pass
            elif kind in PEAKS and decision.limit is not None:
                self._clamp_(name, parameter, gradient, kind, decision.limit[start])
            elif count > 1:
                parameter.grad = scale_units_(gradient, self._clipping.axes[name], factors)
            else:
                scale_one_(gradient, factors[0])
            start += count

    def _clamp_(
        self,
        name: str,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        kind: Kind,
        limit: torch.Tensor,
    ) -> None:
        limit = limit.to(torch.float32)
        limit = limit if self._scale is None else limit * self._scale
        moments = None
        if kind is Kind.RELATIVE_PEAK:
            moments = self._clipping.moments.of(name, parameter)
            if moments is None:
                return
        parameter.grad = clamp_(gradient, limit, moments)

    def _present(self, stage: Stage, here: tuple[bool, ...]) -> torch.Tensor:
        # Kept, since a new one would have to be copied to the device.
        key = (stage.counts, here)
        if key not in self._masks:
            if len(self._masks) >= _PATTERNS:
                self._masks.clear()
            self._masks[key] = self._xp.asarray(np.repeat(here, stage.counts))
        return self._masks[key]

    def _mixed(self, stage: Stage, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        vectors = []
        pairs = zip(
            self._clipping.parameters.items(), gradients, stage.kinds, stage.counts, strict=True
        )
        for (name, parameter), gradient, kind, count in pairs:
            if gradient is None:
                vectors.append(self._xp.zeros((count,)))
                continue
            if kind in RELATIVE:
                gradient = relative(gradient, self._clipping.moments.of(name, parameter))
            axis = self._clipping.axes.get(name)
            if kind is Kind.UNITS and axis is not None:
                vectors.append(unit_norms_of(gradient, axis, stage.order))
            elif kind in PEAKS:
                vectors.append(norms.peak(gradient).reshape(1))
            else:
                vectors.append(norm_of(gradient, stage.order).reshape(1))
        return vectors


class AsyncReadback:
    """An asynchronous copy from a device to the host, polled and never waited for."""

    def __init__(self) -> None:
        self._sent: tuple[torch.Tensor, Any] | None = None

    def send(self, numbers: torch.Tensor) -> None:
        """Start a copy of these numbers to the host, unless another copy is pending."""
        if self._sent is not None:
            return
        moved = numbers.to("cpu", non_blocking=numbers.is_cuda)
        event = None
        if numbers.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(numbers.device))
        self._sent = (moved, event)

    def come(self) -> list[int] | None:
        """Return the copied numbers if the copy is complete, else ``None``."""
        if self._sent is None:
            return None
        numbers, event = self._sent
        if event is not None and not event.query():
            return None
        self._sent = None
        return numbers.tolist()
