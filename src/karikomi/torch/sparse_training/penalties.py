"""Penalties on modules: a scalar to add to the loss before ``backward``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from karikomi.errors import Unsupported
from karikomi.prune.mask_mapping import check_masks
from karikomi.prune.penalties.penalty import Penalty, check_penalty, term
from karikomi.select import select
from karikomi.torch.distributed.dtensors import is_sharded
from karikomi.torch.distributed.fsdp import reshard_
from karikomi.torch.modules.parameters import by_any_name, unit_axes, unwrapped
from karikomi.torch.modules.prunable import PRUNED
from karikomi.torch.numerics.library import TorchNamespace
from karikomi.torch.sparse_training.sharded_penalties import beside, followed

WHERE = "torch.penalty"

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_KINDS = {
    "weights": (PRUNED, "no weight of a Linear or Conv layer"),
    "scales": (_NORMS, "no scale of a batch norm"),
}


def penalty(
    model: nn.Module,
    rule: Penalty,
    *,
    only: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    step: int | None = None,
    masks: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return a penalty on the weights of a module as a scalar: add it to the loss.

    ``strength(step) * sum of the rule's terms``, accumulated in float32 at least; its derivative at zero
    is zero. Weights of Linear, Conv and ConvTranspose layers count, for `ScaleL1` the scales of batch
    norms; biases, other norms, embeddings (and a weight tied to one), recurrent cells, and parameters without
    a gradient do not. Tied weights count once, sharded ones as a whole on every rank. There is no host
    sync; a weight that is not finite makes the sum non-finite, and the clip that follows names it.

    `only`, `exclude`: globs over parameter names. `step`: counted from 0; a strength that changes needs it.
    `masks`: for `GrowingL2`, such as `prune_` returns, true where a weight is kept; those of biases and norms
    do not count; of a sharded weight whole, or of the part on this rank.

    Raises `InvalidArgument` for a rule, masks or a step that do not fit, `UnknownName` for a glob or a mask
    that matches nothing, `Unsupported` with the reasons if nothing is penalised.

    >>> import karikomi as kk
    >>> layer = nn.Linear(2, 2)
    >>> layer.weight.data = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    >>> term = penalty(layer, kk.prune.GroupLasso(0.5))
    >>> term.backward()
    >>> round(float(term.detach()), 4), layer.weight.grad[1].tolist(), layer.bias.grad
    (3.5355, [0.0, 0.0], None)
    """
    masks, weights = _penalised(model, rule, masks, only, exclude)
    strength = rule.strength_at(step)
    terms = [
        _term(rule, weight, axis, None if masks is None else masks[name])
        for name, (weight, axis) in weights.items()
    ]
    return strength * sum((item.to(terms[0].device) for item in terms[1:]), start=terms[0])


def slopes(model: nn.Module, rule: Penalty, *, step: int) -> dict[int, torch.Tensor]:
    """Return the id of each weight that is penalised -> the gradient of `penalty`, by its formula.

    Raises as `penalty`; of sharded weights autograd knows the placements.
    """
    _, weights = _penalised(model, rule, None, None, None)
    strength, found = rule.strength_at(step), {}
    if any(is_sharded(weight) for weight, _ in weights.values()):
        every = [weight for weight, _ in weights.values()]
        with torch.enable_grad():
            of_each = torch.autograd.grad(penalty(model, rule, step=step), every)
        return {id(weight): slope for weight, slope in zip(every, of_each, strict=True)}
    for weight, axis in weights.values():
        plain = weight.detach()
        wide = plain.to(torch.promote_types(plain.dtype, torch.float32))
        axes = () if axis is None else (axis,)
        slope = rule.gradient(wide, axes, xp=TorchNamespace(wide.device, wide.dtype))
        found[id(weight)] = (strength * slope).to(plain.dtype)
    return found


def _penalised(
    model: nn.Module,
    rule: Penalty,
    masks: Mapping[str, torch.Tensor] | None,
    only: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> tuple[Mapping[str, torch.Tensor] | None, dict[str, tuple[nn.Parameter, int | None]]]:
    """Return ``(the masks beside the parameters, name -> weight that is penalised and its unit axis)``."""
    check_penalty(rule, masks, where=WHERE)
    if masks is not None:
        # Masks have the shapes of shards, not of parameters that a forward pass has left gathered.
        reshard_(model)
    model = unwrapped(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if masks is not None:
        masks = beside(masks, parameters)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        check_masks(masks, shapes, where=WHERE)
    axes, _ = unit_axes(model)
    reasons = {n: _why_not(rule, n, axes, masks, why) for n, why in _reasons(model, rule).items()}
    names = select(
        list(reasons),
        only=by_any_name(model, only),
        exclude=by_any_name(model, exclude),
        where=WHERE,
    )
    chosen = [name for name in names if not reasons[name]]
    if not chosen:
        raise Unsupported(
            "there is nothing to penalise",
            where=f"{WHERE} ({type(rule).__name__})",
            got="; ".join(f"{name}: {reasons[name]}" for name in names[:3]),
        )
    return masks, {name: (parameters[name], axes.get(name)) for name in chosen}


def _reasons(model: nn.Module, rule: Penalty) -> dict[str, str]:
    """Return parameter -> why it cannot be penalised, an empty text if it can; each tensor once."""
    layers, other = _KINDS[rule.of]
    found: dict[int, str] = {}
    for layer in model.modules():
        for leaf, parameter in layer.named_parameters(recurse=False):
            why = "" if isinstance(layer, layers) and leaf == "weight" else other
            # A reason of one owner excludes a shared tensor.
            found[id(parameter)] = found.get(id(parameter)) or why or _unfit(parameter)
    return {name: found[id(item)] for name, item in model.named_parameters()}


def _unfit(parameter: nn.Parameter) -> str:
    if isinstance(parameter, nn.UninitializedParameter):
        return "it has no values yet"
    if not parameter.is_floating_point():
        return f"its dtype is {parameter.dtype}"
    if not parameter.requires_grad:
        return "it requires no gradient"
    return "" if parameter.numel() else "it is empty"


def _why_not(
    rule: Penalty,
    name: str,
    axes: Mapping[str, int],
    masks: Mapping[str, torch.Tensor] | None,
    reason: str,
) -> str:
    if reason:
        return reason
    if rule.per_unit and name not in axes:
        return "it has no single unit axis"
    return "it has no mask" if rule.of_marked and name not in (masks or {}) else ""


def _term(
    rule: Penalty, parameter: torch.Tensor, axis: int | None, kept: torch.Tensor | None
) -> torch.Tensor:
    wide = followed(parameter).to(torch.promote_types(parameter.dtype, torch.float32))
    value: Any = term(
        rule,
        wide,
        () if axis is None else (axis,),
        None if kept is None else kept.to(parameter.device),
        xp=TorchNamespace(wide.device, wide.dtype),
        constant=torch.Tensor.detach,
    )
    # A loss is a plain tensor, which cannot be added to a DTensor.
    return value.full_tensor() if is_sharded(value) else value
