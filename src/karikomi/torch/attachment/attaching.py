"""One line for any training loop: clip before every step, mask and bound after it.

Hooks on the optimizer ensure the order: gradients are masked, then clipped,
then the optimizer steps, then updates are clipped, masks renewed and re-applied, weights bounded. Only
the parameters that the optimizer holds are affected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.functional.unit_axes import UnitAxes
from karikomi.prune.penalties.penalty import Penalty
from karikomi.prune.schedules.pruning_schedule import PruningSchedule, check_fields
from karikomi.record import Recorder
from karikomi.rule import Composite, Quantity, Rule
from karikomi.rules import decide
from karikomi.schedule import whole_from
from karikomi.torch.attachment.handle import Handle, Rules, attached
from karikomi.torch.attachment.penalty_gradients import check_attachable
from karikomi.torch.bounding.in_place import MEASURED
from karikomi.torch.clipping.host_step import AVAILABLE
from karikomi.torch.clipping.joint_norms import Groups
from karikomi.torch.modules.parameters import check_values
from karikomi.torch.pruning.masks import Masks

# Wrappers without hooks, which step an optimizer inside of them that has hooks. They are recognised by
# name, so that no trainer is imported.
_WRAPPERS = {
    "accelerate.optimizer.AcceleratedOptimizer",
    "lightning.pytorch.core.optimizer.LightningOptimizer",
    "pytorch_lightning.core.optimizer.LightningOptimizer",
}
_ENGINES = {
    "accelerate.utils.deepspeed.DeepSpeedOptimizerWrapper": "DeepSpeed",
    "deepspeed.runtime.base_optimizer.DeepSpeedOptimizer": "DeepSpeed",
    "accelerate.utils.megatron_lm.MegatronLMOptimizerWrapper": "Megatron-LM",
}


def attach(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    model: nn.Module,
    *,
    clip: Rule | Composite | None = None,
    update: Rule | Composite | None = None,
    bound: Rule | None = None,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    unit_axes: UnitAxes | None = None,
    prune: PruningSchedule | Masks | None = None,
    penalty: Penalty | None = None,
    nonfinite: str = "skip",
    stop_after: int = 10,
    record: Recorder | None = None,
    process_group: Groups | None = None,
    check_ranks: bool = False,
) -> Handle:
    """Clip before, mask and bound after every ``optimizer.step()``, and return the handle.

    `optimizer`: one, or several that step together and share a joint norm (Muon beside AdamW), also
    in the wrappers of accelerate and Lightning. `clip`,
    `bound`: rules of `karikomi.clip` and `karikomi.bound`; without a `clip`, gradients are still
    measured and bad steps skipped. `update`: a rule of `karikomi.clip` for the update, the change of the
    weights divided by the learning rate; it costs a copy of the weights (`BlockRMS` given as `clip` is
    applied like this). `only`, `exclude`: globs over the names of the model's parameters, for `bound`; as in `bound_`,
    a bound without `only` spares the gains of normalisation layers. `unit_axes`: name or glob -> the axis whose index
    is one output unit, for rules per unit, where it is to be another than that of the layer; for `bound` it may be
    several axes. `prune`: a schedule (`OneShot`, `Gradual`,
    `Iterative`, `SET`, `RigL`), or `Masks` to hold; scores by gradients see those of the training steps, dense
    and before the clip. Bounds and
    schedules do not affect parameters that are frozen or of no optimizer here: they are listed in
    ``left_alone`` of ``handle.last_bound`` and ``handle.masks``. `penalty`: of `karikomi.prune`, such as
    ``GroupLasso(1e-4)``; its gradient is added before the clip, as if it were a term of the loss, on all weights of
    this optimizer that `kk.torch.penalty` takes; its schedule counts the steps of the handle.
    `nonfinite`: what a step with NaN or infinite
    gradients does; ``skip`` (default) takes no step and leaves moments alone. `stop_after`: raise
    `NonFinite`, naming the tensors, after that many bad steps in a row. `record`: gets one row per step.
    `process_group`: for plain parameters that are different ones on each rank (pipeline or expert
    parallel): a group, or globs over names -> group; norms are then joint over its ranks. DTensors
    (FSDP2, tensor parallel) need none. `check_ranks`: raise if the ranks decided differently.

    With a fused Adam, AdamW, SGD or Adagrad a factor that is one number is folded into the step, and
    on a device nothing waits for the host (unless `record`, `bound`, `update` or `prune` need numbers).
    A closure that is called once per step is wrapped. torch copies and pickles optimizers without hooks: a copy has
    no handle, of which a warning is given when it is made. Dynamo does not trace the hooks in a compiled step.
    Parameters may join or leave the optimizer, or be replaced, in the middle of a run; a warning says so once.
    What a layer computes its weight from (``spectral_norm``, ``weight_norm``) is neither bounded nor masked.

    Raises `Unsupported` for LBFGS, whose line search would see clipped and unclipped gradients mixed; for an
    optimizer that has a handle, for parameters that the model does not have, for a bound or schedule
    that has nothing to act on, for parameters on the meta device, and for a score that needs more than
    training steps show (`Wanda`). Raises `InvalidArgument` for arguments of another kind. A step
    that an AMP scaler skips is not counted as bad in a row, and is counted as attempted only where the
    optimizer is fused (otherwise it is never called). Warns once of a limit
    that clips more than 95 % or less than 0.1 % of the steps, of weights that change without a step
    of this optimizer, and of masked weights that something else has written (see `Handle.sparsity`).

    >>> import torch, karikomi as kk
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> handle = attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0), bound=kk.bound.Clamp(0.5))
    >>> model(torch.full((1, 4), 100.0)).sum().backward()
    >>> optimizer.step()
    >>> handle.last.action, bool(model.weight.abs().max() <= 0.5)
    ('clipped', True)
    """
    optimizers = _checked_optimizers(optimizer)
    if clip is not None and update is None and getattr(clip, "of", None) is Quantity.UPDATE:
        clip, update = None, clip
    for name, rule, quantities, available in (
        ("clip", clip, [Quantity.GRADIENT], AVAILABLE),
        ("update", update, [Quantity.UPDATE, Quantity.GRADIENT], AVAILABLE),
        ("bound", bound, [Quantity.WEIGHT], MEASURED),
    ):
        if rule is not None:
            where = f"torch.attach({name})"
            decide.check_rule(rule, *quantities, where=where, available=available)
    if prune is not None and not isinstance(prune, PruningSchedule | Masks):
        raise InvalidArgument(
            "prune takes a schedule or masks",
            where="torch.attach",
            got=type(prune).__name__,
            allowed="a schedule such as kk.prune.Gradual(...), or the masks that kk.torch.prune_ returned",
        )
    if penalty is not None:
        check_attachable(penalty)
    if isinstance(prune, PruningSchedule):
        check_fields(prune, where="torch.attach(prune)")
    if record is not None and not isinstance(record, Recorder):
        raise InvalidArgument(
            "this is not a recorder",
            where="torch.attach(record)",
            got=repr(record)[:80],
            allowed="kk.record.Recorder(path)",
        )
    if bound is None and not (only is exclude is None):
        raise InvalidArgument(
            "only and exclude select what a bound affects, and there is none",
            where="torch.attach",
            got=f"only={only!r}, exclude={exclude!r}",
            hint="kk.clip.Groups selects what a clip affects; a schedule for prune has only= of its own",
        )
    decide.check_policy(nonfinite, where="torch.attach")
    bad_steps = whole_from(1, stop_after, "stop_after must be >= 1", where="torch.attach")
    if not isinstance(model, nn.Module) and not (bound is prune is penalty is None):
        raise InvalidArgument(
            "bounds, masks and penalties need the module",
            where="torch.attach",
            got=type(model).__name__,
        )
    if isinstance(model, nn.Module):
        check_values(dict(model.named_parameters()), where="torch.attach")
    return Handle(
        optimizers,
        model,
        Rules(clip, update, bound, prune, only, exclude, penalty, unit_axes),
        nonfinite=nonfinite,
        stop_after=bad_steps,
        record=record,
        process_group=process_group,
        check_ranks=check_ranks,
    )


def _checked_optimizers(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
) -> list[torch.optim.Optimizer]:
    given = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    optimizers: list[Any] = [inside(entry) for entry in given]
    for item in optimizers:
        if not isinstance(item, torch.optim.Optimizer):
            raise InvalidArgument(
                "this is not a torch optimizer", where="torch.attach", got=type(item).__name__
            )
        if isinstance(item, torch.optim.LBFGS):
            raise Unsupported(
                "LBFGS compares losses and gradients of several calls of its closure, so clipping them "
                "would spoil its line search and its curvature",
                where="torch.attach",
                hint="bound its step by lr= or line_search_fn='strong_wolfe'",
            )
        try:
            item.register_step_pre_hook(lambda *_: None).remove()
        except AttributeError:
            raise InvalidArgument(
                "this optimizer takes no hooks: it wraps another one",
                where="torch.attach",
                got=type(item).__name__,
                hint="attach to the optimizer inside it, such as wrapper.optimizer; if the wrapper writes weights "
                "after the step (Lookahead), masks hold again after the next step and after detach()",
            ) from None
        check_unattached(item, where="torch.attach", hint="detach() the other handle first")
    if not optimizers:
        raise InvalidArgument("there is no optimizer", where="torch.attach", got="[]")
    return optimizers


def check_unattached(optimizer: Any, *, where: str, hint: str) -> None:
    """Raise `Unsupported` for an optimizer that has a handle, or whose inner one has, and as `inside` does."""
    if inside(optimizer) in attached:
        raise Unsupported(
            "this optimizer has a handle already: every step would be clipped twice",
            where=where,
            hint=hint,
        )


def inside(optimizer: Any) -> Any:
    """Return the optimizer inside of accelerate's and Lightning's wrappers, or the argument itself.

    Raises `Unsupported` for the wrapper of an engine that owns gradients and steps.
    """
    names = {f"{item.__module__}.{item.__qualname__}" for item in type(optimizer).__mro__}
    for name in names & _ENGINES.keys():
        raise Unsupported(
            f"{_ENGINES[name]} does not expose the gradients and steps inside backward(), so no rule can "
            "be applied",
            where="torch.attach",
            hint="use its own gradient_clipping setting, or train with DDP or FSDP2",
        )
    return inside(optimizer.optimizer) if names & _WRAPPERS else optimizer
