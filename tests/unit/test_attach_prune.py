"""`attach` with masks and schedules of sparsity, and checkpoints of all three parts together."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import niwaki as nw
from niwaki.errors import InvalidArgument, Refused
from unit.test_attach import OPTIMIZERS, assert_same, model_of, optimizers, step, weights

# 8 x 6 and 3 x 8: the two weights that can be pruned.
PRUNABLE = {"0.weight": 48, "2.weight": 24}


def _zeros(model: nn.Module) -> int:
    return sum(int((weights(model)[name] == 0).sum()) for name in PRUNABLE)


@optimizers
def test_masks_hold_through_momentum_and_weight_decay(make: Any) -> None:
    model = model_of()
    optimizer = make(model.parameters())
    for seed in range(3):
        step(model, optimizer, seed)
    masks = nw.torch.prune_(model, sparsity=0.5)
    handle = nw.torch.attach(optimizer, model, clip=nw.clip.ByGlobalNorm(1.0), prune=masks)
    for seed in range(10):
        step(model, optimizer, seed)
        for name, mask in masks.items():
            pruned = weights(model)[name][~mask]
            assert not pruned.any() and not torch.signbit(pruned).any()
    assert handle.sparsity == 0.5 and _zeros(model) == 36


def test_masked_gradients_do_not_count_in_the_norm() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = nw.torch.prune_(model, sparsity=0.5)
    handle = nw.torch.attach(optimizer, model, clip=nw.clip.ByGlobalNorm(1e6), prune=masks)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer.step()
    assert handle.last is not None and handle.last.pre in (3.0, 4.0)


@optimizers
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_gradual_pruning_reaches_its_sparsity_at_its_last_step(make: Any, sparsity: float) -> None:
    model = model_of()
    optimizer = make(model.parameters())
    rule = nw.prune.Gradual(sparsity, steps=(2, 13), every=4)
    handle = nw.torch.attach(optimizer, model, clip=nw.clip.ByGlobalNorm(1.0), prune=rule)
    seen = []
    for seed in range(16):
        step(model, optimizer, seed)
        seen.append(_zeros(model))
    goal = round(sparsity * sum(PRUNABLE.values()))
    assert seen[:2] == [0, 0] and seen == sorted(seen)
    assert seen[11] < goal and seen[12:] == [goal] * 4
    assert handle.sparsity == goal / sum(PRUNABLE.values())
    assert handle.masks is not None
    for name, mask in handle.masks.items():
        for value in optimizer.state[dict(model.named_parameters())[name]].values():
            if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                assert not value[~mask].any()


@pytest.mark.parametrize("frozen", [True, False])
def test_only_what_the_optimizer_moves_is_pruned(frozen: bool) -> None:
    model = model_of()
    if frozen:
        model[0].requires_grad_(False)
    owned = model.parameters() if frozen else model[2].parameters()
    optimizer = torch.optim.SGD(owned, lr=0.1, momentum=0.9)
    before = weights(model)
    rule = nw.prune.Gradual(0.5, steps=(0, 2), every=1)
    handle = nw.torch.attach(optimizer, model, clip=nw.clip.ByGlobalNorm(1.0), prune=rule)
    for seed in range(3):
        step(model, optimizer, seed)
    assert torch.equal(model[0].weight, before["0.weight"]) and _zeros(model) == 12
    assert handle.masks is not None and list(handle.masks) == ["2.weight"]
    reason = "frozen: it requires no gradient" if frozen else "not held by this optimizer"
    assert handle.masks.left_alone["0.weight"] == reason and handle.sparsity == 0.5


def test_given_masks_of_another_optimizer_s_parameters_are_not_held() -> None:
    model = model_of()
    masks = nw.torch.prune_(model, sparsity=0.5)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    handle = nw.torch.attach(optimizer, model, prune=masks)
    assert handle.masks is not None and list(handle.masks) == ["2.weight"]
    assert handle.masks.left_alone["0.weight"] == "not held by this optimizer"
    assert bool((model[0].weight == 1.0).all())
    handle.detach()
    with pytest.raises(Refused, match="holds no masked parameter"):
        nw.torch.attach(optimizer, model, prune=nw.torch.Masks({"0.weight": masks["0.weight"]}))


def test_a_schedule_from_step_zero_prunes_at_the_first_step() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = nw.prune.Gradual(0.5, steps=(0, 200), initial=0.25)
    handle = nw.torch.attach(optimizer, model, prune=rule)
    step(model, optimizer, 0)
    assert handle.sparsity == pytest.approx(rule.sparsity_at(1), abs=1 / 72) and _zeros(model) > 17
    step(model, optimizer, 1)
    assert handle.sparsity == pytest.approx(rule.sparsity_at(1), abs=1 / 72)


def test_masks_move_to_the_device_of_their_parameter_once() -> None:
    masks = nw.torch.Masks({"weight": torch.ones(3, 2, dtype=torch.bool)})
    module = nn.Linear(2, 3, device="meta")
    masks.apply_(module)
    moved = masks["weight"]
    masks.apply_(module)
    assert moved.device.type == "meta" and masks["weight"] is moved


def _attached(name: str) -> tuple[nn.Module, torch.optim.Optimizer, nw.torch.Handle]:
    model = model_of()
    optimizer = OPTIMIZERS[name](model.parameters())
    handle = nw.torch.attach(
        optimizer,
        model,
        clip=nw.clip.ByNorm(nw.schedule.Linear(2.0, 0.1, steps=(0, 10))),
        bound=nw.bound.Clamp(nw.schedule.Linear(0.5, 0.2, steps=(0, 10))),
        prune=nw.prune.Gradual(0.7, steps=(1, 9), every=3),
    )
    return model, optimizer, handle


@pytest.mark.parametrize("name", ["sgd", "adam-loop", "adamw-fused"])
@pytest.mark.parametrize("stop", [1, 4, 9, 11])
def test_a_loaded_checkpoint_continues_bit_for_bit(name: str, stop: int) -> None:
    whole, optimizer, handle = _attached(name)
    stream = io.BytesIO()
    for seed in range(12):
        if seed == stop:
            parts = (whole.state_dict(), optimizer.state_dict(), handle.state_dict())
            torch.save(dict(zip(("model", "optimizer", "handle"), parts, strict=True)), stream)
        step(whole, optimizer, seed)
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    resumed, other, second = _attached(name)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    second.load_state_dict(saved["handle"])
    assert second.steps == stop
    for seed in range(stop, 12):
        step(resumed, other, seed)
    assert_same(weights(resumed), weights(whole))
    assert str(second.last) == str(handle.last) and second.sparsity == handle.sparsity
    one, two = handle.state_dict(), second.state_dict()
    assert (one["clip"], one["bound"], one["steps"]) == (two["clip"], two["bound"], two["steps"])


def test_a_state_of_something_else_is_refused() -> None:
    _, _, handle = _attached("sgd")
    with pytest.raises(InvalidArgument, match="not the state of a handle"):
        handle.load_state_dict({"steps": 1})
    model, optimizer, _ = _attached("sgd")
    step(model, optimizer, 0)
    bare = nw.torch.attach(torch.optim.SGD(model.parameters()), model)
    good = {"steps": 1, "clip": {"attempted": 1}, "bound": None, "masks": None}
    with pytest.raises(InvalidArgument, match="the handle has no such rule"):
        bare.load_state_dict({**good, "clip": None, "bound": good["clip"]})
    with pytest.raises(InvalidArgument, match="another rule"):
        handle.load_state_dict(good)
