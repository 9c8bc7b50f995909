"""The loss of a training: on the targets, on the dense network's distributions, or on both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.schedule import is_number
from karikomi.torch.modules.fingerprint import tensors_of
from karikomi.torch.modules.parameters import unwrapped
from karikomi.torch.tracing.batches import MISSING, Batch

WHERE = "torch.recover_"

Loss = Callable[[Any, Any], torch.Tensor]


def logits_of(outputs: Any) -> Any:
    """Return the logits of an output that is a mapping or an object with such an entry, else the output."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    return getattr(outputs, "logits", outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationLoss:
    """Loss on the targets of a batch, on the teacher's distributions, or on both; see `recover_`.

    ``(1 - weight) loss(f(x), y) + weight T^2 KL(softmax(teacher(x) / T) || softmax(f(x) / T))``, the divergence a
    mean over all distributions. `axis`: of the classes in the outputs; None is the last of two.
    `ignore_index`: the target whose distribution is left out of that mean. `select`: the logits in what
    the networks return. `where`: for errors.

    Source: Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network".
    """

    loss: Loss | None
    teacher: nn.Module | None = None
    temperature: float = 2.0
    weight: float = 0.5
    axis: int | None = None
    ignore_index: int | None = None
    select: Callable[[Any], Any] = logits_of
    where: str = WHERE

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, math.inf, "a finite number > 0")
        check_number("weight", self.weight, 1.0, "0 < weight <= 1")
        alone = self.teacher is not None and self.weight == 1
        if not alone and not callable(self.loss):
            raise InvalidArgument(
                "no loss to train with",
                where=WHERE,
                got=None if self.loss is None else repr(self.loss)[:80],
                hint="pass loss=, such as torch.nn.functional.cross_entropy",
            )
        if alone and self.loss is not None:
            raise InvalidArgument(
                "weight=1 is the teacher alone, and the loss would have no effect",
                where=WHERE,
                hint="omit loss=, or pass a lower weight",
            )

    def check(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Raise `Unsupported` for a teacher that the training would change."""
        if self.teacher is None:
            return
        if not isinstance(self.teacher, nn.Module):
            raise InvalidArgument(
                "the teacher is a module", where=WHERE, got=type(self.teacher).__name__
            )
        moved = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]} - {0}
        buffers = {buffer.data_ptr() for buffer in unwrapped(module).buffers()} - {0}
        for name, tensor in tensors_of(self.teacher).items():
            if tensor.data_ptr() in moved | buffers:
                raise Unsupported(
                    "the teacher shares this tensor with the module, and would be trained with it",
                    where=f"{WHERE}: teacher",
                    got=name,
                    hint="teacher = copy.deepcopy(module), before pruning",
                )

    def of(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss of a batch, to be differentiated."""
        outputs = module(*batch.positional, **batch.named)
        if self.teacher is None:
            return self._own(outputs, batch)
        with torch.no_grad():
            taught = self.teacher(*batch.positional, **batch.named)
        share = float(self.weight)
        total = 0.0 if self.loss is None else (1.0 - share) * self._own(outputs, batch)
        return self._checked(
            total + share * self.temperature**2 * self._distance(outputs, taught, batch)
        )

    def _own(self, outputs: Any, batch: Batch) -> torch.Tensor:
        if batch.targets is MISSING:
            raise InvalidArgument(
                "a batch has no targets",
                where=f"{self.where}: data",
                allowed="(inputs, targets); or inputs alone, with a teacher and weight=1",
            )
        assert self.loss is not None  # noqa: S101  (checked in __post_init__)
        return self._checked(self.loss(outputs, batch.targets))

    def _checked(self, loss: Any) -> torch.Tensor:
        if not isinstance(loss, torch.Tensor) or loss.shape != () or not loss.requires_grad:
            shape = tuple(getattr(loss, "shape", ()))
            raise InvalidArgument(
                "the loss must be a 0-d tensor that depends on the network",
                where=f"{self.where}: loss",
                got=f"shape {shape}, requires_grad={getattr(loss, 'requires_grad', False)}",
            )
        return loss

    def _distance(self, outputs: Any, taught: Any, batch: Batch) -> torch.Tensor:
        """Return the mean divergence of the softened distributions, without the T^2."""
        outputs, taught = self.select(outputs), self.select(taught)
        axis = self._axis(outputs, taught)
        cold, warm = (
            F.log_softmax(
                output / self.temperature,
                axis,
                dtype=torch.promote_types(output.dtype, torch.float32),
            )
            for output in (outputs, taught)
        )
        apart, targets = (warm.exp() * (warm - cold)).sum(axis), batch.targets
        if self.ignore_index is None or getattr(targets, "shape", None) != apart.shape:
            return apart.mean()
        counted = apart[targets != self.ignore_index]
        return counted.sum() / max(counted.numel(), 1)

    def _axis(self, outputs: Any, taught: Any) -> int:
        shapes = [tuple(getattr(output, "shape", ())) for output in (outputs, taught)]
        rank = len(shapes[0])
        if shapes[0] != shapes[1] or rank < 2:
            raise InvalidArgument(
                "distillation compares tensors of logits, (batch, classes) or more",
                where=f"{self.where}: teacher",
                got=" and ".join(map(str, shapes)),
            )
        if self.axis is None and rank > 2:
            raise InvalidArgument(
                "the class axis of outputs with more than two axes is ambiguous",
                where=f"{self.where}: axis",
                got=shapes[0],
                allowed="axis=1 for (batch, classes, height, width), axis=-1 for sequences",
            )
        axis = -1 if self.axis is None else self.axis
        if not -rank <= axis < rank or shapes[0][axis] < 2:
            raise InvalidArgument(
                "a distribution is over two or more classes",
                where=f"{self.where}: axis",
                got=f"axis {axis} of {shapes[0]}",
            )
        return axis


def check_number(name: str, value: Any, most: float, allowed: str) -> None:
    """Raise `InvalidArgument` unless ``0 < value <= most`` and finite."""
    if not is_number(value) or not 0.0 < float(value) <= most or math.isinf(value):
        raise InvalidArgument(
            f"{name} is out of range", where=WHERE, got=repr(value), allowed=allowed
        )
