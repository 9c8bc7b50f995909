"""Clip the gradients of torch parameters in place, between ``backward()`` and ``step()``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from karikomi.rule import Composite, Quantity, Rule, State
from karikomi.rules import decide
from karikomi.rules.outcome import Outcome
from karikomi.torch.clipping.host_step import AVAILABLE, Clipping
from karikomi.torch.clipping.joint_norms import Groups, Sharding
from karikomi.torch.clipping.second_moments import Moments
from karikomi.torch.internals import opaque
from karikomi.torch.modules.parameters import Parameters, check_parameters, check_values, named


@opaque
@torch.no_grad()
def clip_(
    parameters: Parameters,
    rule: Rule | Composite,
    state: State | None = None,
    *,
    nonfinite: str = "skip",
    optimizer: torch.optim.Optimizer | None = None,
    process_group: Groups | None = None,
    check_ranks: bool = False,
) -> tuple[Outcome, dict[str, Any]]:
    """Clip the ``.grad`` of parameters in place and return ``(outcome, state)``.

    `parameters`: a module (its names are reported), or an iterable of parameters or of
    ``(name, parameter)``; tied parameters count once. `state`: what the last call returned, ``None``
    for a fresh one; plain data, in which statistics are stored by tensor name. `nonfinite`:
    the policy for a step with a NaN or infinite gradient: ``skip`` (default) sets the gradients to ``None``,
    so that the optimizer changes neither parameters nor moments; ``zero`` zeroes only the bad tensors;
    ``pass`` leaves them; ``raise`` raises `NonFinite` naming them. `optimizer`: its second
    moments are used by `SPAM`, where it keeps some (Adam and variants); otherwise they are kept in the state.
    `process_group`, `check_ranks`: as for `attach`. Sharded parameters (DTensor) need neither.

    Raises `InvalidArgument` when there is no gradient to clip, `Unsupported` for a rule that does not act on
    gradients. Reads the norms on the host; no tensor is multiplied that is not clipped.

    >>> import torch, karikomi as kk
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> outcome, state = clip_(model, kk.clip.ByGlobalNorm(1.0))
    >>> print(outcome)
    pre 5 -> post 1 x0.2 clipped; top: weight 100%
    """
    decide.check_rule(rule, Quantity.GRADIENT, where="torch.clip_", available=AVAILABLE)
    decide.check_policy(nonfinite, where="torch.clip_")
    found = named(parameters, where="torch.clip_")
    check_values(found, where="torch.clip_")
    check_parameters(found, where="torch.clip_")
    clipping = Clipping(
        found,
        rule,
        module=parameters if isinstance(parameters, nn.Module) else None,
        nonfinite=nonfinite,
        moments=Moments(*([] if optimizer is None else [optimizer])),
        sharding=Sharding.of(found, process_group, check_ranks=check_ranks),
        where="torch.clip_",
    )
    clipping.load(state)
    return clipping.step(), clipping.plain()
