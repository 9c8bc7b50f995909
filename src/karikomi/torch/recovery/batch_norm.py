"""Re-estimate the statistics of batch norms after pruning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.tasks.metrics import sign_of
from karikomi.torch.internals import batch_norm_type
from karikomi.torch.modules.parameters import check_values, unwrapped
from karikomi.torch.tracing.batches import MISSING, batches_of
from karikomi.torch.tracing.eval_mode import Judge, steady
from karikomi.torch.tracing.restoring import restored_unless_kept

WHERE = "recalibrate_"


@dataclass(frozen=True, slots=True)
class Recalibration:
    """The validation metric `before` and `after`, and whether the new statistics were `kept`."""

    before: float
    after: float
    kept: bool


@torch.no_grad()
def recalibrate_(
    module: nn.Module,
    data: Iterable[Any],
    *,
    judge: Judge | Iterable[Any],
    loss: Callable[[Any, Any], torch.Tensor] | None = None,
    goal: str = "max",
) -> Recalibration:
    """Re-estimate the mean and variance of each batch norm on `data`; keep them if the metric improves.

    The cumulative average over batches, with equal weights; in eval mode except for the batch norms. Kept only
    if the validation metric is better than before, else, and after an error, every buffer is restored
    bit for bit. Modes and momenta are restored.

    `data`: batches ``(inputs, targets)``, or inputs alone. `judge`: ``judge(module) -> number`` on
    held-out data, higher is better, or lower with ``goal="min"``; or such data, ``(inputs, targets)``, with a
    `loss(outputs, targets)` that is a mean over the batch. Raises `Unsupported`
    without batch norms that keep statistics, `InvalidArgument` for missing arguments and for batches of one value.

    >>> module = nn.Sequential(nn.BatchNorm1d(1))
    >>> data = [torch.tensor([[1.0], [3.0]])]
    >>> recalibrate_(module, data, judge=lambda one: -abs(round(float(one(data[0]).mean()), 3)))
    Recalibration(before=-2.0, after=-0.0, kept=True)
    >>> module[0].running_mean, module[0].training
    (tensor([2.]), True)

    Source: of averaging over many batches, Izmailov et al. 2018, "Averaging Weights Leads to Wider
    Optima"; after pruning, Li et al. 2020, "EagleEye". Deviation: `judge`.
    """
    module = unwrapped(module)
    check_values(module.state_dict(), where=WHERE)
    norms = [item for item in module.modules() if _keeps_statistics(item)]
    if not norms:
        raise Unsupported("no batch norm here keeps statistics", where=WHERE)
    sign = sign_of(goal, where=WHERE)
    judged = judge if callable(judge) else _by_loss(judge, loss)
    if not callable(judge) and goal != "max":
        raise InvalidArgument(
            "a goal is for a judge that is a function: of held-out data the loss is minimised",
            where=WHERE,
            got=repr(goal),
        )
    with steady(module, fresh=False), restored_unless_kept(lambda: _buffers(norms)) as snapshot:
        before = float(judged(module))
        _estimate_(module, norms, data)
        after = float(judged(module))
        kept = math.isfinite(after) and not sign * after <= sign * before
        if kept:
            snapshot.keep()
    return Recalibration(before, after, kept)


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, batch_norm_type()) and isinstance(module.running_mean, torch.Tensor)


def _estimate_(module: nn.Module, norms: list[Any], data: Iterable[Any]) -> None:
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        for batch in batches_of(data, module, where=f"{WHERE}: data"):
            try:
                module(*batch.positional, **batch.named)
            except ValueError as error:
                raise InvalidArgument(
                    "a batch has no statistics", where=f"{WHERE}: data", got=error
                ) from error
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.training = momentum, False


def _buffers(norms: list[Any]) -> dict[str, torch.Tensor]:
    return {
        f"{number}.{name}": buffer
        for number, norm in enumerate(norms)
        for name, buffer in norm.named_buffers(recurse=False)
    }


def _by_loss(data: Iterable[Any], loss: Callable[[Any, Any], torch.Tensor] | None) -> Judge:
    if loss is None or isinstance(data, Iterator):
        raise InvalidArgument(
            "held-out batches need a loss, and are read twice",
            where=f"{WHERE}: judge",
            got="no loss" if loss is None else type(data).__name__,
            allowed="judge(module) -> number; or a list of (inputs, targets), with loss=",
        )

    def judged(module: nn.Module) -> float:
        total, examples = 0.0, 0
        for batch in batches_of(data, module, where=f"{WHERE}: judge"):
            if batch.targets is MISSING:
                raise InvalidArgument("a batch has no targets", where=f"{WHERE}: judge")
            outputs = module(*batch.positional, **batch.named)
            total += batch.examples * float(loss(outputs, batch.targets))
            examples += batch.examples
        return -total / examples

    return judged
