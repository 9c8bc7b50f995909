"""Training goes on in the smaller network: optimizers, averages of weights, masks and handles follow."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import karikomi as kk
from karikomi.errors import InvalidArgument, Unsupported

INPUTS = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(64) % 3
Make = Callable[[Any], torch.optim.Optimizer]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 12),
        nn.GELU(),
        nn.Linear(12, 3),
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    some = slice(8 * (number % 8), 8 * (number % 8) + 8)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(INPUTS[some]), TARGETS[some])
    loss.backward()
    optimizer.step()
    return loss.item()


def kept_masks(model: nn.Module, kept: dict[str, dict[int, list[int]]]) -> dict[str, torch.Tensor]:
    """Return name -> where a parameter has its kept entries."""
    masks = {}
    for name, parameter in model.named_parameters():
        masks[name] = torch.ones_like(parameter, dtype=torch.bool)
        for axis, indices in kept.get(name, {}).items():
            along = torch.zeros(parameter.shape[axis], dtype=torch.bool)
            along[indices] = True
            masks[name] &= along.view([-1 if a == axis else 1 for a in range(parameter.dim())])
    return masks


def cut(tensor: torch.Tensor, axes: dict[int, list[int]]) -> torch.Tensor:
    for axis, indices in axes.items():
        tensor = tensor.index_select(axis, torch.tensor(indices))
    return tensor


SGD: Make = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3)  # noqa: E731
ADAM: Make = lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True)  # noqa: E731


@pytest.mark.parametrize("make", [SGD, ADAM], ids=["SGD", "AdamW"])
def test_the_loss_goes_on_as_with_masks(make: Make) -> None:
    model = net()
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for number in range(4):
        step(model, optimizer, number)
        scheduler.step()
    masked = copy.deepcopy(model)
    other = make(masked.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(other, 20)
    other_scheduler.load_state_dict(scheduler.state_dict())
    small, report = kk.torch.shrink(model, INPUTS[:2], width=0.5, follow=optimizer)
    masks = kept_masks(masked, report.kept)

    def hold() -> None:
        with torch.no_grad():
            for name, parameter in masked.named_parameters():
                parameter *= masks[name]

    hold()
    assert report.parameters_after < 0.5 * report.parameters_before
    for number in range(4, 12):
        expected = step(masked, other, number)
        hold()
        assert step(small, optimizer, number) == pytest.approx(expected, rel=1e-6)
        scheduler.step()
        other_scheduler.step()
        assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] < 0.1
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == list(map(id, small.parameters()))
    assert len(optimizer.state) == len(list(small.parameters()))


def test_groups_stay_and_moments_are_cut_by_the_kept_indices() -> None:
    model, head = net(), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(
        [
            {"params": [*model[:2].parameters(), *head.parameters()], "lr": 0.5},
            {"params": list(model[2:].parameters()), "weight_decay": 0.1},
        ],
        lr=0.01,
        momentum=0.9,
    )
    head(model(INPUTS[:8])).square().sum().backward()
    optimizer.step()
    groups = list(optimizer.param_groups)
    moments = {
        n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()
    }
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    small, report = kk.torch.shrink(model, INPUTS[:2], width=0.5, follow=[optimizer])
    assert all(one is other for one, other in zip(groups, optimizer.param_groups, strict=True))
    first, second = (list(map(id, group["params"])) for group in groups)
    assert first == list(map(id, [*small[:2].parameters(), *head.parameters()]))
    assert second == list(map(id, small[2:].parameters()))
    assert (groups[0]["lr"], groups[1]["weight_decay"]) == (0.5, 0.1)
    for name, parameter in small.named_parameters():
        axes = report.kept.get(name, {})
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], cut(moments[name], axes))
        assert torch.equal(parameter.grad, cut(gradients[name], axes))
    assert {0} == set(report.kept["0.weight"]) and {0, 1} == set(report.kept["4.weight"])
    assert optimizer.state[head.weight]["momentum_buffer"].shape == (2, 3)


def test_a_factored_moment_is_cut_along_the_axes_that_it_has() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    rows = optimizer.state[model[0].weight]["row_var"].clone()
    columns = optimizer.state[model[2].weight]["col_var"].clone()
    small, report = kk.torch.shrink(model, torch.ones(1, 4), width=0.5, follow=optimizer)
    kept = report.kept["0.weight"][0]
    assert torch.equal(optimizer.state[small[0].weight]["row_var"], rows[kept])
    assert torch.equal(optimizer.state[small[2].weight]["col_var"], columns[:, kept])
    assert optimizer.state[small[0].weight]["col_var"].shape == (1, 4)


def test_an_average_of_weights_follows() -> None:
    model = net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = SGD(model.parameters())
    for number in range(3):
        step(model, optimizer, number)
        average.update_parameters(model)
    before = {name: tensor.clone() for name, tensor in average.module.named_parameters()}
    small, report = kk.torch.shrink(model, INPUTS[:2], width=0.5, follow=[average, optimizer])
    assert int(average.n_averaged) == 3 and average.module is not small
    for name, tensor in average.module.named_parameters():
        assert torch.equal(tensor, cut(before[name], report.kept.get(name, {}))), name
    middle = average.module[6].bias.detach().clone()
    step(small, optimizer, 3)
    average.update_parameters(small)
    assert torch.allclose(average.module[6].bias, 0.9 * middle + 0.1 * small[6].bias)
    assert average(INPUTS[:2]).shape == (2, 3)


def test_a_folded_constant_is_added_to_the_average_too() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1], model[2].weight[0, 1] = 0.0, 2.0, 0.25
    average = AveragedModel(model)
    average.module[2].bias.data.fill_(7.0)
    small, report = kk.torch.shrink(model, torch.randn(2, 2), follow=average)
    assert report.removed == 1
    assert torch.equal(small[2].bias, model[2].bias + 0.5)
    assert average.module[2].bias.item() == pytest.approx(7.5)


def test_masks_follow() -> None:
    model = net()
    masks = kk.torch.prune_(model, sparsity=0.6)
    before = {name: mask.clone() for name, mask in masks.items()}
    small, report = kk.torch.shrink(model, INPUTS[:2], width=0.5, follow=masks)
    assert set(masks) == set(before)
    for name, parameter in small.named_parameters():
        if name in masks:
            assert torch.equal(masks[name], cut(before[name], report.kept[name]))
            assert torch.equal(parameter != 0, masks[name])
    masks.apply_(small)


def test_a_handle_follows_with_its_optimizer_statistics_and_masks() -> None:
    model = net()
    masks = kk.torch.prune_(model, sparsity=0.5, only="4.weight")
    optimizer = SGD(model.parameters())
    handle = kk.torch.attach(
        optimizer, model, clip=kk.clip.SPAM(), bound=kk.bound.SpectralCap(3.0), prune=masks
    )
    for number in range(3):
        step(model, optimizer, number)
    moments = {
        name: tensor.clone()
        for name, tensor in handle.state_dict()["clip"]["second_moment"].items()
    }
    small, report = kk.torch.shrink(model, INPUTS[:2], width=0.5, follow=handle)
    state = handle.state_dict()
    assert handle.steps == 3 and handle.optimizers == (optimizer,)
    for name, moment in state["clip"]["second_moment"].items():
        assert torch.equal(moment, cut(moments[name], report.kept.get(name, {}))), name
    assert handle.masks is not None and handle.masks["4.weight"].shape == small[4].weight.shape
    step(small, optimizer, 3)
    assert handle.steps == 4 and torch.equal(small[4].weight != 0, handle.masks["4.weight"])
    assert handle.last is not None and set(handle.last.tensors()) == set(moments)


def test_a_schedule_goes_on_in_the_smaller_network() -> None:
    model = net()
    optimizer = SGD(model.parameters())
    schedule = kk.prune.Gradual(0.5, steps=(2, 6), every=2, score="taylor")
    handle = kk.torch.attach(optimizer, model, prune=schedule)
    for number in range(3):
        step(model, optimizer, number)
    small, _ = kk.torch.shrink(model, INPUTS[:2], width=0.5, follow=handle)
    for number in range(3, 7):
        step(small, optimizer, number)
    assert handle.sparsity == pytest.approx(0.5, abs=0.01)
    assert handle.masks is not None
    assert {name: mask.shape for name, mask in handle.masks.items()} == {
        name: small.get_parameter(name).shape for name in handle.masks
    }


def test_what_cannot_follow_is_named_and_nothing_is_changed() -> None:
    model = net()
    optimizer = SGD(model.parameters())
    step(model, optimizer, 0)
    groups = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    lbfgs = torch.optim.LBFGS(model.parameters())
    foreign = SGD(net(1).parameters())
    preconditioned = SGD(model.parameters())
    preconditioned.state[model[4].weight] = {"factor": torch.eye(12)[None]}
    listed = SGD(model.parameters())
    listed.state[model[4].weight] = {"history": [torch.zeros(12)]}
    for other, says in (
        (lbfgs, "the history of LBFGS"),
        (foreign, "follow: the optimizer holds no parameter of the module"),
        (preconditioned, r"4.weight: 'factor' of SGD has another shape.*got .1, 12, 12."),
        (listed, "4.weight: 'history' of SGD is no tensor"),
        (AveragedModel(nn.Linear(2, 2)), "the average is of another module"),
        (
            AveragedModel(nn.Sequential(nn.Conv2d(2, 9, 3))),
            "0.weight: the average is of another module",
        ),
        (model, "this cannot follow.*got Sequential; allowed: optimizers"),
        (kk.torch.Masks({"9.weight": torch.ones(1, dtype=torch.bool)}), "no such parameter"),
    ):
        with pytest.raises((InvalidArgument, Unsupported, LookupError), match=says):
            kk.torch.shrink(model, INPUTS[:2], width=0.5, follow=[optimizer, other])
        assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == groups
    assert len(optimizer.state) == len(groups)
    handle = kk.torch.attach(optimizer, nn.Sequential(model))
    with pytest.raises(Unsupported, match="the handle is of another module"):
        kk.torch.shrink(model, INPUTS[:2], width=0.5, follow=handle)
