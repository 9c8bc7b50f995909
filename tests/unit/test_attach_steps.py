"""Steps within steps, steps that raise, scalers that step, and copies of optimizers."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import nn

import karikomi as kk
from karikomi.errors import InvalidArgument, Unsupported

PARENT, SCALER = torch.optim.AdamW, torch.amp.GradScaler


class Child(PARENT):
    """An optimizer whose step calls its parent's, which runs the hooks a second time."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if self.fails:
            raise RuntimeError("out of memory")
        return loss


@pytest.fixture(autouse=True)
def hooked_parent() -> None:
    """Torch hooks the step of a class when the first instance of it is made."""
    PARENT([nn.Parameter(torch.zeros(1))])


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def backward(model: nn.Module, seed: int) -> torch.Tensor:
    model.zero_grad()
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    loss = model(inputs).square().sum() * 30
    loss.backward()
    return loss


def run(kind: type[torch.optim.Optimizer], *, closure: bool) -> tuple[kk.torch.Handle, list[Any]]:
    model = model_of()
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.AutoClip(50.0))
    for seed in range(4):
        if closure:
            optimizer.step(lambda seed=seed: backward(model, seed))
        else:
            backward(model, seed)
            optimizer.step()
    return handle, [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_within_a_step_is_clipped_once(closure: bool) -> None:
    handle, weights = run(Child, closure=closure)
    expected, others = run(PARENT, closure=closure)
    assert handle.steps == expected.steps == 4
    assert all(map(torch.equal, weights, others))
    handle.detach()


def test_a_parent_that_is_made_after_attach_runs_no_second_clip() -> None:
    class Late(torch.optim.Rprop):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model = model_of()
    optimizer = Late(model.parameters())
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByNorm(0.5))
    backward(model, 0)
    optimizer.step()
    torch.optim.Rprop([nn.Parameter(torch.zeros(1))])
    optimizer.step()
    assert handle.steps == 2
    handle.detach()


def test_a_step_that_raises_is_tried_again() -> None:
    model = model_of()
    optimizer = Child(model.parameters(), lr=0.1)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    backward(model, 0)
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.fails = False
    backward(model, 1)
    optimizer.step()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert float(norm) == pytest.approx(1.0, rel=1e-5)
    assert handle.steps == 2
    handle.detach()


def test_methods_of_torch_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test of this process may still hold a handle.
    monkeypatch.setattr("karikomi.torch.internals._recorded", {})
    before = PARENT.step, SCALER.step
    model = model_of()
    pair = [Child(model[0].parameters(), lr=0.1), PARENT(model[2].parameters(), lr=0.1)]
    first = kk.torch.attach(pair, model)
    other = model_of()
    single = Child(other.parameters(), lr=0.1)
    second = kk.torch.attach(single, other)
    for model_, optimizers in ((model, pair), (other, [single])):
        backward(model_, 0)
        for optimizer in optimizers:
            optimizer.step()
    assert (first.steps, second.steps) == (1, 1)
    assert PARENT.step is not before[0] and SCALER.step is not before[1]
    first.detach()
    assert PARENT.step is not before[0] and SCALER.step is before[1]
    second.detach()
    second.detach()
    assert (PARENT.step, SCALER.step) == before


def test_methods_of_torch_are_put_back_without_a_detach(monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test of this process may still hold a handle.
    monkeypatch.setattr("karikomi.torch.internals._recorded", {})
    before = SCALER.step
    model = model_of()
    pair = [torch.optim.SGD(model[place].parameters(), lr=0.1) for place in (0, 2)]
    kk.torch.attach(pair, model)
    assert SCALER.step is not before
    del pair, model
    gc.collect()
    assert SCALER.step is before


@pytest.mark.parametrize("unscaled", [True, False])
def test_two_scalers_are_two_matters(unscaled: bool) -> None:
    """Each scaler steps the optimizers of its own handle; the other one is not asked."""
    for size in (16.0, 1024.0):
        model = model_of()
        pair = [torch.optim.SGD(model[place].parameters(), lr=0.1) for place in (0, 2)]
        handle = kk.torch.attach(pair, model, clip=kk.clip.ByGlobalNorm(1.0))
        scaler = SCALER("cpu", init_scale=size)
        scaler.scale(model(torch.ones(2, 6)).square().sum()).backward()
        if unscaled:
            for optimizer in pair:
                scaler.unscale_(optimizer)
            for optimizer in pair:
                scaler.step(optimizer)
            assert handle.steps == 1 and handle.last is not None
        else:
            with pytest.raises(Unsupported, match="unscale_"):
                scaler.step(pair[0])


def test_a_disabled_scaler_within_another_is_passed_over() -> None:
    model = model_of()
    pair = [torch.optim.SGD(model[place].parameters(), lr=0.1) for place in (0, 2)]
    handle = kk.torch.attach(pair, model, clip=kk.clip.ByGlobalNorm(1.0))
    scaler = SCALER("cpu", enabled=False)
    scaler.scale(model(torch.ones(2, 6)).square().sum()).backward()
    for optimizer in pair:
        scaler.step(optimizer)
    assert handle.steps == 1


def test_a_copied_optimizer_has_no_handle() -> None:
    model = model_of()
    optimizer = Child(model.parameters(), lr=0.1)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByNorm(0.5))
    backward(model, 0)
    optimizer.step()
    with pytest.warns(UserWarning, match="the copy has no handle.*; attach to the copy"):
        other, copied = copy.deepcopy((model, optimizer))
    assert type(copied.defaults) is dict and copied.defaults == optimizer.defaults
    with pytest.warns(UserWarning, match="copied or pickled, which loses hooks"):
        torch.save(optimizer, io.BytesIO())
    copy.deepcopy(model), optimizer.state_dict()  # what a checkpoint and an average need
    backward(other, 1)
    copied.step()
    assert handle.steps == 1
    second = kk.torch.attach(copied, other, clip=kk.clip.ByNorm(0.5))
    backward(other, 2)
    copied.step()
    assert (handle.steps, second.steps) == (1, 1)
    handle.detach()
    backward(other, 3)
    copied.step()
    assert second.steps == 2
    second.detach()
    copy.deepcopy((optimizer, copied))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_penalty_is_as_a_term_of_the_loss(scaled: bool) -> None:
    rule = kk.prune.GroupLasso(kk.schedule.Linear(0.0, 1.0, steps=(0, 2)))
    given, byhand = model_of(), model_of()
    make = lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)  # noqa: E731
    optimizers = [make(given), make(byhand)]
    limit = kk.clip.ByGlobalNorm(2.0)
    handle = kk.torch.attach(optimizers[0], given, clip=limit, penalty=rule)
    other = kk.torch.attach(optimizers[1], byhand, clip=limit)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    for step in range(4):
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((given, byhand), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(inputs).square().sum()
            if model is byhand:
                loss = loss + kk.torch.penalty(model, rule, step=step)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        scaler.update()
        assert handle.last is not None and other.last is not None
        assert handle.last.pre == pytest.approx(other.last.pre, rel=1e-5)
    for mine, theirs in zip(given.parameters(), byhand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_penalty_that_cannot_act_is_refused_at_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    with pytest.raises(Unsupported, match="holds nothing that is penalised; got 1.weight, 1.bias"):
        kk.torch.attach(optimizer, model, penalty=kk.prune.L1(0.1))
    with pytest.raises(Unsupported, match="GrowingL2 needs masks .*kk.torch.penalty"):
        kk.torch.attach(optimizer, model, penalty=kk.prune.GrowingL2())
    with pytest.raises(InvalidArgument, match="not a penalty; got 0.1"):
        kk.torch.attach(optimizer, model, penalty=0.1)  # type: ignore[arg-type]
    assert model[0].weight.grad is None


def test_the_handle_has_the_factor_of_each_group() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    groups = kk.clip.Groups({"weight": kk.clip.ByNorm(1.0)}, default=kk.clip.ByNorm(10.0))
    handle = kk.torch.attach(optimizer, model, clip=groups)
    model(torch.tensor([[3.0, 4.0]])).sum().backward()
    optimizer.step()
    assert handle.last is not None
    assert handle.last.factors == pytest.approx({"weight": 0.2, "default": 1.0})


def test_a_parameter_that_an_optimizer_holds_twice_is_named_as_such() -> None:
    model = nn.Linear(2, 1)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD([model.weight, model.weight, model.bias], lr=0.1)
    with pytest.raises(Unsupported, match="holds 1 parameter.s. twice.* got SGD"):
        kk.torch.attach(optimizer, model)
    pair = [torch.optim.SGD([model.weight], lr=0.1) for _ in range(2)]
    with pytest.raises(Unsupported, match="two optimizers hold the same parameter"):
        kk.torch.attach(pair, model)
