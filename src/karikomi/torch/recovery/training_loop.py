"""The training loop of `recover_` and of the built-in search: a falling rate, a loss, an attached optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from karikomi.torch.attachment.attaching import attach
from karikomi.torch.attachment.handle import Handle
from karikomi.torch.tracing.batches import Batch
from karikomi.torch.tracing.eval_mode import steady


class StepLoss(Protocol):
    """What is differentiated in each step; `teacher`: a network that it runs, if any."""

    @property
    def teacher(self) -> nn.Module | None:
        """The network to distil from."""
        ...

    def of(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss of a batch."""
        ...


class TrainingLoop:
    """Steps of an attached optimizer; its learning rates fall by ``(1 + cos(pi t / steps)) / 2`` to zero.

    `steps`: of all epochs together. `rates`: the initial ones, one per parameter group. `warm`: the first steps, in
    which they rise from ``1 / warm`` of that.
    """

    handle: Handle

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: StepLoss,
        steps: int,
        *,
        warm: int = 0,
    ) -> None:
        self.module, self.optimizer, self.loss = module, optimizer, loss
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._steps, self._warm = steps, warm

    def attach_(self, **how: Any) -> Handle:
        """Attach clipping, bounds and pruning to the optimizer, as `attach` does."""
        self.handle = attach(self.optimizer, self.module, **how)
        return self.handle

    def detach_(self) -> None:
        """Detach, clear the gradients and reset the learning rates."""
        self.handle.detach()
        self.module.zero_grad(set_to_none=True)
        self._set_rates(1.0)

    def epoch(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        """Take one step per batch, in training mode; yield the loss of each, detached."""
        teacher = self.loss.teacher
        with nullcontext() if teacher is None else steady(teacher, fresh=False):
            if not self.module.training:
                self.module.train()
            for batch in batches:
                fallen = 0.5 * (1.0 + math.cos(math.pi * self._progress()))
                risen = min((self.handle.steps + 1) / self._warm, 1.0) if self._warm else 1.0
                self._set_rates(fallen * risen)
                self.module.zero_grad(set_to_none=True)
                loss = self.loss.of(self.module, batch)
                loss.backward()
                self.optimizer.step()
                yield loss.detach()

    def _progress(self) -> float:
        return min(self.handle.steps / self._steps, 1.0)

    def _set_rates(self, share: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate * share)
            else:
                group["lr"] = rate * share


@torch.no_grad()
def match_moments_(optimizer: torch.optim.Optimizer) -> None:
    """Give each moment the memory layout of its parameter, after `load_state_dict`."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            # A fused kernel walks memory, so equal strides are part of the result.
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
