"""Small networks, alike on all ranks, and the comparison of a sharded one with the same one alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import karikomi as kk

STRENGTHS = (1.0, 0.8, 1.2, 30.0, 1.0)


class Block(nn.Module):
    """An embedding of features, a feed-forward pair and a norm; widths are odd, so that shards are uneven."""

    def __init__(self, width: int = 6, hidden: int = 10) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.head = nn.Linear(width, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return one number per row."""
        return self.head(self.norm(inputs) + self.down(torch.tanh(self.up(inputs))))


def pair(build: Callable[[], nn.Module] = Block) -> tuple[Any, Any]:
    """Return two equal networks, the same on all ranks."""
    torch.manual_seed(1)
    alone = build()
    return copy.deepcopy(alone), alone


def backward(model: Any, strength: float = 1.0) -> None:
    """Give a network the gradients of a loss on data that all ranks have."""
    torch.manual_seed(2)
    inputs = torch.randn(8, 6).to(next(model.parameters()).dtype)
    model.zero_grad()
    (strength * model(inputs).square().sum()).backward()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor, of which this rank perhaps has a part."""
    part = getattr(tensor, "full_tensor", None)
    return tensor.detach() if part is None else part().detach()


def gap(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """Return the largest difference of two sets of tensors, relative to the largest entry of each."""
    gaps = []
    for name, tensor in theirs.items():
        largest = float(tensor.abs().max()) or 1.0
        gaps.append(float((ours[name] - tensor).abs().max()) / largest)
    return max(gaps)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Return name -> whole gradient, of those that have one."""
    return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Return name -> whole parameter."""
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def numbers(outcome: Any) -> list[Any]:
    """Return what a person reads of an outcome."""
    return [outcome.pre, outcome.post, outcome.factor, outcome.action, outcome.engaged]


def clipped(
    model: Any,
    alone: Any,
    rule: Any,
    *,
    strengths: Sequence[float] = (1.0,),
    **arguments: Any,
) -> dict[str, Any]:
    """Clip both networks by `clip_` for some steps; what is found here, and what alone."""
    facts: list[list[Any]] = []
    state = alone_state = None
    for strength in strengths:
        for one in (model, alone):
            backward(one, strength)
        outcome, state = kk.torch.clip_(model, rule, state, **arguments)
        expected, alone_state = kk.torch.clip_(alone, rule, alone_state)
        facts += compared(outcome, expected, model, alone)
    facts.append(["state", plain(state), plain(alone_state)])
    return {"facts": facts, "same": {"state": plain(state), "numbers": [f[1] for f in facts]}}


def compared(outcome: Any, expected: Any, model: Any, alone: Any) -> list[list[Any]]:
    """Return facts ``[what, here, alone]`` of one step."""
    return [
        ["outcome", numbers(outcome), numbers(expected)],
        ["tensors", outcome.tensors(), expected.tensors()],
        ["stages", len(outcome.earlier), len(expected.earlier)],
        ["gradients", gap(gradients(model), gradients(alone)), 0.0],
    ]


def plain(state: Any) -> Any:
    """Return a state without the second moments, which lie where the gradients do."""
    return {key: value for key, value in (state or {}).items() if key != "second_moment"}


def attached(
    model: Any,
    alone: Any,
    optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    strengths: Sequence[float] = STRENGTHS,
    before: Callable[[Any, int], None] = lambda model, step: None,
    rules: Mapping[str, Any],
    **arguments: Any,
) -> dict[str, Any]:
    """Train both networks with a handle; `before` may spoil the gradients of a step."""
    optimizers = [optimizer(one.parameters()) for one in (model, alone)]
    handles = [
        kk.torch.attach(optimizers[0], model, **rules, **arguments),
        kk.torch.attach(optimizers[1], alone, **rules),
    ]
    facts: list[list[Any]] = []
    for step, strength in enumerate(strengths):
        for one, own in zip((model, alone), optimizers, strict=True):
            backward(one, strength)
            before(one, step)
            own.step()
        last, expected = (handle.last for handle in handles)
        facts.append(["outcome", numbers(last), numbers(expected)])
        facts.append(["nonfinite", last.nonfinite, expected.nonfinite])
        facts.append(["weights", gap(weights(model), weights(alone)), 0.0])
    states = [plain(handle.state_dict()["clip"]) for handle in handles]
    facts.append(["state", *states])
    return {"facts": facts, "same": {"state": states[0], "numbers": [f[1] for f in facts]}}


def message(call: Callable[[], Any]) -> str:
    """Return the class and the text of the error that a call raises, or that it raises none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def rank() -> int:
    """Return which rank this is."""
    return dist.get_rank()
