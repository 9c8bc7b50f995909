"""Bounds in a training loop through `attach`: after every step, checkpointed, refused at once."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import karikomi as kk
from karikomi.errors import InvalidArgument, UnknownName, Unsupported
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


class RootMeanSquareNorm(nn.Module):
    """A normalisation that is none of torch's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.scale * inputs / inputs.square().mean(-1, keepdim=True).sqrt()


def normalised(**how: Any) -> tuple[nn.Module, Any]:
    """Return a network whose weights and gains are 1, and its handle, after a step of length 0."""
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        RootMeanSquareNorm(4),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.Linear(4, 4),
    )
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = kk.torch.attach(optimizer, model, bound=kk.bound.Clamp(0.01), **how)
    return model, handle


def stepped(model: nn.Module, handle: Any) -> dict[str, float]:
    model(torch.randn(8, 4)).sum().backward()
    handle._optimizers[0].step()
    return {name: p.flatten()[0].item() for name, p in model.named_parameters()}


GAINS = ["1.weight", "2.scale", "3.weight", "4.weight"]


def test_gains_of_normalisation_layers_are_spared_unless_they_are_selected() -> None:
    model, handle = normalised()
    values = stepped(model, handle)
    assert [name for name, value in values.items() if value == 1.0] == GAINS
    assert {round(value, 6) for name, value in values.items() if name not in GAINS} == {0.01}
    assert list(handle.last_bound.left_alone) == GAINS
    assert "only='*'" in handle.last_bound.left_alone["1.weight"]
    assert {round(value, 6) for value in stepped(*normalised(only="*")).values()} == {0.01}
    model, handle = normalised(only=["*.weight"], exclude="5.*")
    values = stepped(model, handle)
    bounded = ["0.weight", "1.weight", "3.weight", "4.weight"]
    assert [name for name, value in values.items() if value < 1.0] == bounded
    assert handle.last_bound.left_alone["5.weight"] == "not selected"
    model, handle = normalised(exclude="0.*")
    bounded = ["1.bias", "3.bias", "4.bias", "5.weight", "5.bias"]
    assert [name for name, value in stepped(model, handle).items() if value < 1.0] == bounded


def test_bound_in_place_spares_the_same_gains() -> None:
    model, _ = normalised()
    outcome, state = kk.torch.bound_(model, kk.bound.MaxNorm(0.5, per="tensor"))
    assert list(outcome.left_alone) == GAINS and model[1].weight.norm() == 2.0
    kk.torch.bound_(model, kk.bound.MaxNorm(0.5, per="tensor"), state)
    assert model[3].weight.norm() == 2.0
    with pytest.raises(InvalidArgument, match="no tensor to bound.*1.weight: a gain.*only='\\*'"):
        kk.torch.bound_(model, kk.bound.Clamp(1.0), exclude=["0.*", "5.*", "*bias"])


def test_a_state_from_before_gains_were_spared_keeps_bounding_them() -> None:
    model, handle = normalised()
    stepped(model, handle)
    state = handle.state_dict()
    earlier = {**state, "bound": {k: v for k, v in state["bound"].items() if k != "spared"}}
    for saved, spared in ((state, True), (earlier, False)):
        for _ in range(2):
            model, handle = normalised()
            handle.load_state_dict(saved)
            assert (stepped(model, handle)["1.weight"] == 1.0) is spared
            saved = handle.state_dict()
        model, _ = normalised()
        kk.torch.bound_(model, kk.bound.Clamp(0.01), saved["bound"])
        assert (model[1].weight[0].item() == 1.0) is spared


def test_a_selection_that_selects_nothing_is_refused() -> None:
    with pytest.raises(
        UnknownName, match="torch.attach.bound.: .*'6.weight'.*did you mean '5.weight'"
    ):
        normalised(only="6.weight")
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model[1:].parameters(), lr=0.1)
    with pytest.raises(Unsupported, match="nothing is left to bound.*got 1.weight: a gain"):
        kk.torch.attach(optimizer, model, bound=kk.bound.Clamp(1.0), exclude="1.bias")
    with pytest.raises(InvalidArgument, match="only and exclude select what a bound affects"):
        kk.torch.attach(optimizer, model, clip=kk.clip.ByNorm(1.0), exclude="*.bias")


def test_gains_that_join_the_optimizer_later_are_spared_too() -> None:
    model, _ = normalised()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.0)
    handle = kk.torch.attach(optimizer, model, bound=kk.bound.Clamp(0.01))
    stepped(model, handle)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    with pytest.warns(UserWarning, match="of the parameters that attach acts on, 2 are"):
        values = stepped(model, handle)
    assert (values["1.weight"], round(values["1.bias"], 6)) == (1.0, 0.01)
    assert "only='*'" in handle.last_bound.left_alone["1.weight"]
