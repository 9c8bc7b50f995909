"""The loss of a task in torch: built-in or the user's, alone or with a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from karikomi.errors import InvalidArgument
from karikomi.tasks.task import Task
from karikomi.tasks.user_code import called
from karikomi.torch.recovery.distillation import DistillationLoss
from karikomi.torch.tracing.batches import Batch, leaves

Loss = Callable[[Any, Any], torch.Tensor]

_BY_NAME = "logits"
"""The entry that is taken of several outputs unless a task names another: that of classifiers."""


def selected(outputs: Any, task: Task) -> torch.Tensor:
    """Return the tensor that is judged of what a network returned.

    Raises `InvalidArgument`, with the form of the outputs, where a task must choose one of several.
    """
    if isinstance(outputs, torch.Tensor):  # as networks with auxiliary heads return in evaluation
        return outputs
    wanted = task.output
    found = _entry(outputs, _BY_NAME if wanted is None else wanted)
    if isinstance(found, torch.Tensor):
        return found
    raise InvalidArgument(
        "the network returns no single tensor" if wanted is None else "there is no such output",
        where=f"task {task.name}",
        got=f"{_form(outputs)}{'' if wanted is None else f', output={wanted!r}'}",
        hint='choose one of several: the task\'s output= is a key ("logits") or a place (0)',
    )


def place_of_selected(outputs: Any, task: Task) -> int:
    """Return which of the tensors that a network returned is judged, counted as an exported graph has them."""
    judged = selected(outputs, task)
    return next(place for place, tensor in enumerate(leaves(outputs)) if tensor is judged)


def loss_of(task: Task) -> Loss:
    """Return the task's loss as a torch function of what the network returns, and the targets."""
    if callable(task.loss):
        return task.loss
    losses = {"cross_entropy": _cross_entropy, "mean_squared_error": _mean_squared_error}
    if task.loss not in losses:
        raise InvalidArgument(
            "unknown loss", where=f"task {task.name}", got=task.loss, allowed=sorted(losses)
        )
    loss = losses[task.loss]
    return lambda outputs, targets: loss(selected(outputs, task), targets, task)


def criterion_of(
    task: Task, make: Callable[[], nn.Module], teacher: Callable[[nn.Module], nn.Module] | None
) -> DistillationLoss:
    """Return the loss of a training; `teacher` fills a network with the weights to distil from."""
    recipe, where = task.recipe, f"task {task.name}"
    if teacher is None or recipe.distill == 0 or task.loss != "cross_entropy":
        return TaskLoss(loss=loss_of(task), where=where)
    return TaskLoss(
        loss=None if recipe.distill == 1 else loss_of(task),
        teacher=teacher(make()).eval(),
        temperature=recipe.temperature,
        weight=recipe.distill,
        axis=task.class_axis,
        ignore_index=task.ignore_index,
        select=lambda outputs: selected(outputs, task),
        where=where,
    )


class TaskLoss(DistillationLoss):
    """The loss of a task, with a `KarikomiError` for any exception of the user's network or loss."""

    def of(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss of a batch, to be differentiated."""
        what = "the model or its loss failed on a training batch"
        return called(lambda: DistillationLoss.of(self, module, batch), what, where=self.where)


def _cross_entropy(outputs: torch.Tensor, targets: torch.Tensor, task: Task) -> torch.Tensor:
    rows = outputs.movedim(task.class_axis, 1)
    if targets.is_floating_point():
        return F.cross_entropy(rows, targets.movedim(task.class_axis, 1).to(rows.dtype))
    # torch refuses int32, and returns NaN for a batch in which no target counts.
    if not bool((targets != task.ignore_index).any()):
        return 0.0 * rows.sum()
    return F.cross_entropy(rows, targets.long(), ignore_index=task.ignore_index)


def _mean_squared_error(outputs: torch.Tensor, targets: torch.Tensor, task: Task) -> torch.Tensor:
    if outputs.shape != targets.shape:
        # torch would broadcast (n, 1) against (n,) to (n, n).
        raise InvalidArgument(
            "outputs and targets differ in shape",
            where=f"task {task.name}: mean_squared_error",
            got=f"{tuple(outputs.shape)} and {tuple(targets.shape)}",
        )
    return F.mse_loss(outputs, targets.to(outputs.dtype))


def _entry(outputs: Any, wanted: str | int) -> Any:
    if isinstance(wanted, int):
        places = isinstance(outputs, tuple | list) and -len(outputs) <= wanted < len(outputs)
        return outputs[wanted] if places else None
    return outputs.get(wanted) if isinstance(outputs, Mapping) else getattr(outputs, wanted, None)


def _form(outputs: Any) -> str:
    if isinstance(outputs, torch.Tensor):
        return f"a tensor {tuple(outputs.shape)}"
    kind = type(outputs).__name__
    if isinstance(outputs, Mapping):
        return f"{kind} with {', '.join(map(repr, outputs))}"
    if isinstance(outputs, tuple | list):
        return f"{kind} of {', '.join(_form(item) for item in outputs)}"
    return kind
