"""Fine-tune a pruned network, with or without distillation; keep it only if a validation metric allows it."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.rule import Composite, Rule
from karikomi.schedule import whole_from
from karikomi.tasks.metrics import sign_of
from karikomi.torch.distributed.replicas import gathered
from karikomi.torch.modules.fingerprint import tensors_of
from karikomi.torch.modules.parameters import check_values, unwrapped
from karikomi.torch.pruning.masks import Masks
from karikomi.torch.recovery.distillation import WHERE, DistillationLoss, Loss, check_number
from karikomi.torch.recovery.retraining import Retraining
from karikomi.torch.tracing.eval_mode import Judge, steady
from karikomi.torch.tracing.isolation import isolated
from karikomi.torch.tracing.restoring import Snapshot, restored_unless_kept

RATE = 1e-3
"""The initial learning rate of the default optimizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """The validation metric `before` and `after` (None without one), and whether the weights were `kept`.

    `losses`: the mean training loss of each epoch.

    >>> print(Recovery(before=0.5, after=0.75, kept=True, losses=(1.5, 0.25)))
    2 epoch(s), loss 1.5 -> 0.25; judged 0.5 -> 0.75: kept
    """

    before: float | None
    after: float | None
    kept: bool
    losses: tuple[float, ...]

    def __str__(self) -> str:
        """Return it as one line."""
        text = f"{len(self.losses)} epoch(s), loss {self.losses[0]:.4g} -> {self.losses[-1]:.4g}"
        if self.before is None:
            return text
        outcome = "kept" if self.kept else "not kept, the weights are those before"
        return f"{text}; judged {self.before:.4g} -> {self.after:.4g}: {outcome}"


def recover_(
    module: nn.Module,
    masks: Masks | None,
    data: Iterable[Any],
    *,
    loss: Loss | None = None,
    epochs: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    rate: float | None = None,
    teacher: nn.Module | None = None,
    temperature: float = 2.0,
    weight: float = 0.5,
    axis: int | None = None,
    clip: Rule | Composite | None = None,
    bound: Rule | None = None,
    judge: Judge | None = None,
    goal: str = "max",
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Recovery:
    """Train a pruned or shrunk module in place with its masks applied, and return the losses and the metric.

    ``L = (1 - weight) loss(f(x), y) + weight T^2 KL(softmax(teacher(x) / T) || softmax(f(x) / T))``, the
    divergence a mean over all distributions; without a `teacher` the loss alone. The learning rate
    falls by ``(1 + cos(pi t / steps)) / 2`` from its present value to zero.

    `masks`: of `prune_`; None for a module without masks, such as the smaller one of `shrink`: then zeros are
    trained like all other weights. `data`: batches ``(inputs, targets)``, read once per epoch; inputs alone where
    ``weight=1``, which needs no `loss` either. `epochs`: at least 1. `optimizer`: made for this module's
    parameters, by default AdamW with `rate` (1e-3); masked moments are zeroed. `teacher`: the dense network; it is
    not changed.
    `temperature` T > 0; `weight` in (0, 1]; `axis` of the classes in the outputs, required for outputs of
    more than two axes. `clip`, `bound`: as in `attach`. `judge`: ``judge(module) -> number`` on
    held-out data, higher is better, or lower with ``goal="min"``; the weights are kept if it is not worse than
    before, else, and after an error, everything is restored bit for bit. `seed`: each epoch draws its random
    numbers, a DataLoader's order included, from (seed, epoch). `checkpoint`: a file that is written after each
    epoch and continued from, bit for bit as without the interruption, given the same module and arguments, and
    data that is the same in each epoch or shuffled by torch's random numbers. With replicas (DDP) the first
    writes it for all, and all take the same path; the weights are kept if the metric allows it on all ranks.

    A module that is not in training mode is set to it; modes are restored, and the gradients cleared.
    Frozen parameters do not change.

    Raises `InvalidArgument` for invalid arguments, `Unsupported` for a teacher that shares trained
    weights with the module, if every parameter is frozen, and for a checkpoint of another recovery; `BadFile`
    for a file that is not a checkpoint; `NonFinite` after ten bad steps in a row.

    >>> import torch.nn.functional as F, karikomi as kk
    >>> net = nn.Linear(4, 2)
    >>> masks = kk.torch.prune_(net, sparsity=0.5)
    >>> data = [(torch.eye(4), torch.tensor([0, 0, 1, 1]))] * 10
    >>> result = recover_(net, masks, data, loss=F.cross_entropy, epochs=3, rate=0.1)
    >>> result.kept, result.losses[-1] < result.losses[0], int((net.weight == 0).sum())
    (True, True, 4)

    Source: Han et al. 2015 (train on with masks); Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in
    a Neural Network" (weight and T^2). Deviation: `judge`.
    """
    criterion = DistillationLoss(
        loss=loss, teacher=teacher, temperature=temperature, weight=weight, axis=axis
    )
    sign = sign_of(goal, where=WHERE)
    masks = Masks() if masks is None else masks
    _check(module, masks, data, epochs, seed)
    check_values(dict(module.named_parameters()), where=WHERE)
    optimizer = _optimizer(module, optimizer, rate)
    criterion.check(module, optimizer)
    with torch.inference_mode(False), torch.enable_grad():
        masks.apply_(module)
        with _all_restored_unless_kept(module, optimizer) as snapshot:
            before = _judged(judge, module, seed)
            training = Retraining(module, masks, optimizer, criterion, data, epochs, seed, progress)
            losses = training.run_(clip, bound, checkpoint)
            after = _judged(judge, module, seed)
            kept = before is None or after is None or _no_worse(sign * after, sign * before)
            # Each rank evaluates the metric by itself; the weights are kept on all, or on none.
            kept = all(gathered(module, kept))
            if kept:
                snapshot.keep()
    return Recovery(before=before, after=after, kept=kept, losses=losses)


def _no_worse(after: float, before: float) -> bool:
    return math.isfinite(after) and not after < before


@contextmanager
def _all_restored_unless_kept(
    module: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[Snapshot]:
    moments = copy.deepcopy(optimizer.state_dict())
    modes = [(layer, layer.training) for layer in module.modules()]
    with restored_unless_kept(lambda: tensors_of(module)) as snapshot:
        try:
            yield snapshot
        finally:
            for layer, mode in modes:
                layer.training = mode
            if not snapshot.kept:
                optimizer.load_state_dict(moments)


def _judged(judge: Judge | None, module: nn.Module, seed: int) -> float | None:
    if judge is None:
        return None
    # The same random numbers before and after, for a metric that draws some.
    with torch.no_grad(), steady(module, fresh=False), isolated(seed, 0):
        return float(judge(module))


def _optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, rate: float | None
) -> torch.optim.Optimizer:
    if optimizer is not None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InvalidArgument(
                "not a torch optimizer", where=WHERE, got=type(optimizer).__name__
            )
        if rate is not None:
            raise InvalidArgument(
                "the optimizer has its own learning rate", where=WHERE, got=f"rate={rate!r}"
            )
        return optimizer
    rate = RATE if rate is None else rate
    check_number("rate", rate, math.inf, "a finite number > 0")
    moved = [parameter for parameter in unwrapped(module).parameters() if parameter.requires_grad]
    if not moved:
        raise Unsupported("every parameter is frozen", where=WHERE, hint="requires_grad_(True)")
    fused = all(item.is_floating_point() and item.device.type in ("cpu", "cuda") for item in moved)
    return torch.optim.AdamW(moved, lr=float(rate), fused=fused)


def _check(module: Any, masks: Any, data: Any, epochs: Any, seed: Any) -> None:
    for name, value, kind in (("module", module, nn.Module), ("masks", masks, Masks)):
        if not isinstance(value, kind):
            raise InvalidArgument(
                f"{name} takes a {kind.__name__}",
                where=WHERE,
                got=type(value).__name__,
                hint="masks = kk.torch.prune_(module, ...)" if kind is Masks else None,
            )
    single = isinstance(data, tuple) and any(isinstance(batch, torch.Tensor) for batch in data)
    batches = isinstance(data, Iterable) and not isinstance(data, torch.Tensor | Mapping | Iterator)
    if single or not batches:
        raise InvalidArgument(
            "data is an iterable of batches, read once per epoch",
            where=f"{WHERE}: data",
            got=type(data).__name__,
            allowed="a list of (inputs, targets) or a DataLoader",
        )
    for name, value, least in (("epochs", epochs, 1), ("seed", seed, 0)):
        whole_from(least, value, f"{name} is a whole number >= {least}", where=WHERE)
