"""Bounds in a training loop through `attach`: after every step, checkpointed, refused at once."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import karikomi as kk
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.torch.bounding.attention_logits import watch_logits

BOUNDS = [
    kk.bound.UnitNorm(1.0),
    kk.bound.NonNegative(),
    kk.bound.InitScaled(1.5),
    kk.bound.SpectralCap(0.8),
    kk.bound.QKClip(0.5),
]


class Small(nn.Module):
    """A layer of attention between two dense ones."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.outward = nn.Linear(8, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.inward(inputs)
        return self.outward(hidden + self.attention(hidden, hidden, hidden)[0])


def trained(rule: Any, steps: int, resume_at: int | None = None) -> tuple[nn.Module, Any]:
    """Return the model and its handle after steps, stopped and begun anew from a file at one of them."""
    model, optimizer, handle = _begun(rule)
    for step in range(steps):
        if step == resume_at:
            file = io.BytesIO()
            torch.save([one.state_dict() for one in (model, optimizer, handle)], file)
            file.seek(0)
            model, optimizer, handle = _begun(rule)
            states = torch.load(file, weights_only=True)
            for one, state in zip((model, optimizer, handle), states, strict=True):
                one.load_state_dict(state)
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(4, 5, 6, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, handle


def _begun(rule: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = Small()
    if isinstance(rule, kk.bound.QKClip):
        watch_logits(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, optimizer, kk.torch.attach(optimizer, model, bound=rule)


@pytest.mark.parametrize("rule", BOUNDS, ids=lambda rule: type(rule).__name__)
def test_resuming_is_the_same_as_not_stopping(rule: Any) -> None:
    plain, handle = trained(rule, 6)
    assert handle.last_bound.share_at_bound > 0.0
    for stop in (1, 4):
        again, _ = trained(rule, 6, resume_at=stop)
        for name, parameter in again.named_parameters():
            assert torch.equal(parameter, plain.get_parameter(name)), name


def test_every_step_ends_within_the_cap() -> None:
    model, handle = trained(kk.bound.SpectralCap(0.8), 6)
    sizes = [torch.linalg.svdvals(p.detach())[0] for p in model.parameters() if p.dim() == 2]
    assert max(sizes) <= 0.8 * 1.001 and handle.last_bound.left_alone["inward.bias"] == "a bias"


def test_a_bound_that_can_never_act_is_refused_at_once() -> None:
    norms = nn.LayerNorm(4)
    optimizer = torch.optim.SGD(norms.parameters(), lr=0.1)
    with pytest.raises(Unsupported, match="no selected tensor has a fan-in"):
        kk.torch.attach(optimizer, norms, bound=kk.bound.InitScaled())
    with pytest.raises(Unsupported, match="the module has no attention that is known here"):
        kk.torch.attach(optimizer, norms, bound=kk.bound.QKClip())
    layer = nn.MultiheadAttention(8, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(Unsupported, match="QKClip needs the largest logit .*watch_logits"):
        kk.torch.attach(optimizer, layer, bound=kk.bound.QKClip())


def test_a_handle_refuses_the_state_of_another_bound() -> None:
    _, handle = trained(kk.bound.SpectralCap(0.8), 1)
    _, other = trained(kk.bound.NonNegative(), 1)
    for one, foreign in ((handle, other), (other, handle)):
        with pytest.raises(InvalidArgument):
            one.load_state_dict({**one.state_dict(), "bound": foreign.state_dict()["bound"]})
