"""The explicit clip in a loop with Hugging Face accelerate, instead of ``accelerator.clip_grad_norm_``.

`kk.torch.attach` takes the prepared optimizer and does not need this; a clip by hand must be
done at the right step, after unscaling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from karikomi.errors import Unsupported
from karikomi.plugins.trainer_handle import flattened, refuse_flattened

if TYPE_CHECKING:
    import torch

    from karikomi.rule import Composite, Rule, State
    from karikomi.rules.outcome import Outcome
    from karikomi.torch.modules.parameters import Parameters

_REFUSED = {
    "DEEPSPEED": "DeepSpeed does not expose the gradients and steps inside backward()",
    "MEGATRON_LM": "Megatron-LM does not expose the gradients and steps inside the model",
    "XLA": "on XLA the gradients are not reduced yet",
}


def accelerate_clip_(
    accelerator: Any,
    parameters: Parameters,
    rule: Rule | Composite,
    state: State | None = None,
    *,
    nonfinite: str = "skip",
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[Outcome | None, State | None]:
    """Clip in place between ``accelerator.backward()`` and ``step()``; return ``(outcome, state)``.

    While gradients are being accumulated (``accelerator.sync_gradients`` is false) nothing is done,
    and the outcome is ``None``. Gradients scaled for float16 are unscaled first. `parameters`,
    `rule`, `state`, `nonfinite`: as for `kk.torch.clip_`. `optimizer`: the prepared
    optimizer of these gradients; without it all prepared optimizers are unscaled.

    Raises `Unsupported` for DeepSpeed, Megatron-LM, FSDP1 and XLA, where gradients are not available,
    for an `optimizer` attached by `kk.torch.attach` (without `optimizer` that is not detected), and
    the errors of `kk.torch.clip_`.

    >>> import torch, karikomi as kk
    >>> from types import SimpleNamespace
    >>> accelerator = SimpleNamespace(  # stands in for accelerate.Accelerator()
    ...     sync_gradients=True, distributed_type="NO", unscale_gradients=lambda optimizer: None)
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> outcome, state = accelerate_clip_(accelerator, model, kk.clip.ByGlobalNorm(1.0))
    >>> print(outcome)
    pre 5 -> post 1 x0.2 clipped; top: weight 100%
    """
    from karikomi import torch
    from karikomi.torch.attachment.attaching import check_unattached, inside

    _check(accelerator, parameters)
    if optimizer is not None:
        hint = "omit this call and pass the rule to attach, or detach() the handle first"
        check_unattached(optimizer, where="accelerate_clip_(optimizer)", hint=hint)
    if not accelerator.sync_gradients:
        return None, state
    accelerator.unscale_gradients(optimizer)
    wrapped = None if optimizer is None else inside(optimizer)
    return torch.clip_(parameters, rule, state, nonfinite=nonfinite, optimizer=wrapped)


def _check(accelerator: Any, parameters: Any) -> None:
    where = "accelerate_clip_"
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in _REFUSED:
        hint = "kk.torch.attach(optimizer, model) clips after the reduction"
        if kind != "XLA":
            hint = "use its own gradient_clipping setting, or train with DDP or FSDP2"
        raise Unsupported(_REFUSED[kind], where=where, hint=hint)
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise flattened(where)
    refuse_flattened(parameters, where=where)
