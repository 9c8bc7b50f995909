"""Quantized training in a phase of the search: rounded parameters, and a penalty that follows a goal in bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from karikomi.quantize import Coded, RateGoal
from karikomi.tasks.runner import Arrays, LearnedCodes
from karikomi.torch.modules.arrays import to_arrays
from karikomi.torch.quantization.while_training import learned_places, quantized_training
from karikomi.torch.recovery.training_loop import StepLoss
from karikomi.torch.tracing.batches import Batch


class CodesInTraining:
    """The parameters of a model, rounded from now on; the term of the loss that a step of training adds.

    The strength of the penalty is raised or lowered after each step, so that the bits follow the path of `RateGoal`.
    """

    def __init__(
        self, model: nn.Module, how: LearnedCodes, steps: int, masks: dict[str, torch.Tensor] | None
    ) -> None:
        self._training = quantized_training(model, bits=how.width, masks=masks)
        self._model, self._how = model, how
        last = max(int(steps * how.ramp), 1)
        # A short training has to move faster to arrive.
        self._goal = RateGoal(how.goal, last=last, gain=min(max(how.gain, 20.0 / last), 0.5))
        self.strength, self.first, self.done = how.strength, self._training.size().total, 0

    def groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups of an optimizer: weights at its own rate, steps of the grids at theirs."""
        steps = self._training.steps()
        own = {id(step) for step in steps}
        weights = [item for item in self._model.parameters() if id(item) not in own]
        return [{"params": weights}, {"params": steps, "lr": self._how.step_rate}]

    def term(self) -> torch.Tensor:
        """Return ``strength * bits`` of this step, and set the strength of the next."""
        bits = self._training.bits()
        term = self.strength * bits
        path = self._goal.path(self.first, self.done)
        self.strength = self._goal.next(self.strength, used=bits.item(), path=path)
        self.done += 1
        return term

    def codes(self) -> dict[str, Coded]:
        """Return the codes and grids as they are now, under all ordinary names of their parameters."""
        first = self._training.codes()
        places = [(name, id(own)) for name, _, own in learned_places(self._model)]
        by_identity = {own: first[name] for name, own in places if name in first}
        return {name: by_identity[own] for name, own in places}

    def arrays(self) -> Arrays:
        """Return the tensors of the model under their ordinary names, codes decoded."""
        arrays = to_arrays(self._model)
        chains = tuple(f"{chain}." for _, chain, _ in learned_places(self._model))
        plain = {name: array for name, array in arrays.items() if not name.startswith(chains)}
        return {**plain, **{name: coded.decode() for name, coded in self.codes().items()}}

    def facts(self) -> dict[str, float]:
        """Return what a continuation needs beside the tensors."""
        return {"strength": self.strength, "first": self.first, "done": self.done}

    def restore(self, facts: dict[str, Any]) -> None:
        """Continue from `facts`."""
        self.strength, self.first = float(facts["strength"]), float(facts["first"])
        self.done = int(facts["done"])


class PenalisedLoss:
    """A loss, and the penalty on the bits of the codes while they are trained."""

    def __init__(self, loss: StepLoss, codes: CodesInTraining) -> None:
        self._loss, self._codes = loss, codes

    @property
    def teacher(self) -> nn.Module | None:
        """The network to distil from."""
        return self._loss.teacher

    def of(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss of a batch with the penalty, to be differentiated."""
        return self._loss.of(module, batch) + self._codes.term()
