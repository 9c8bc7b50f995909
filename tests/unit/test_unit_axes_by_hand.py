"""`unit_axes=` of `attach` and `clip_`: which axis is one unit, where the layer does not say it or says another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import karikomi as kk
from karikomi.errors import InvalidArgument, UnknownName, Unsupported


class Custom(nn.Module):
    """A layer that declares no unit axis, beside one that does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(3, 5))
        self.head = nn.Linear(5, 2, bias=False)


def stepped(**options: Any) -> tuple[Custom, kk.torch.Handle]:
    model = Custom()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = kk.torch.attach(optimizer, model, **options)
    for parameter in model.parameters():
        parameter.grad = 10 * torch.ones_like(parameter)
    optimizer.step()
    return model, handle


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_bound_takes_the_axis_by_hand(axis: int) -> None:
    axes = {"table": axis, "head.*": -1}
    model, handle = stepped(bound=kk.bound.UnitNorm(0.5), unit_axes=axes)
    assert torch.allclose(model.table.detach().norm(dim=1 - axis % 2), torch.tensor(0.5))
    assert torch.allclose(model.head.weight.detach().norm(dim=0), torch.tensor(0.5))
    # The state has one number per unit, and continues.
    again, other = stepped(bound=kk.bound.UnitNorm(0.5), unit_axes=axes)
    other.load_state_dict(handle.state_dict())
    assert torch.equal(again.table, model.table)


def test_a_clip_and_updates_take_it_too() -> None:
    rule = kk.clip.ByNorm(1.0, per="unit")
    for options in ({"clip": rule}, {"update": rule}):
        model, _ = stepped(**options, unit_axes={"table": 1})
        moved = Custom().table.detach() - model.table.detach()
        assert torch.allclose(moved.norm(dim=0), torch.tensor(1.0), atol=1e-5)
    model = Custom()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    kk.torch.clip_(model.named_parameters(), rule, unit_axes={"table": 1})
    assert model.table.grad is not None and model.head.weight.grad is not None
    assert torch.allclose(model.table.grad.norm(dim=0), torch.tensor(1.0))
    assert float(model.head.weight.grad.norm()) == pytest.approx(1.0)


def test_several_axes_are_one_unit_of_a_bound_and_refused_by_a_clip() -> None:
    model, _ = stepped(bound=kk.bound.MaxNorm(0.1), unit_axes={"table": (0, 1)})
    assert float(model.table.detach().abs().max()) == pytest.approx(0.1)
    with pytest.raises(Unsupported, match="several axes"):
        stepped(clip=kk.clip.AGC(0.1), unit_axes={"table": (0, 1)})


def test_names_and_axes_that_do_not_exist_are_errors() -> None:
    for axes, error in (({"tabel": 0}, UnknownName), ({"table": 2}, InvalidArgument)):
        for options in ({"bound": kk.bound.MaxNorm(1.0)}, {"clip": kk.clip.AGC(0.1)}):
            with pytest.raises(error, match="tabel|axis"):
                stepped(**options, unit_axes=axes)
