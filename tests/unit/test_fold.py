"""Folding a factor into fused optimizers: the same step, no multiplication, attributes always put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import karikomi as kk
from karikomi.errors import NonFinite
from karikomi.torch.numerics import norms

FUSED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda p, **o: torch.optim.Adam(p, lr=0.01, **o),
    "adamw": lambda p, **o: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, **o),
    "sgd": lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, **o),
    "adagrad": lambda p, **o: torch.optim.Adagrad(p, lr=0.1, **o),
}
fused = pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def backward(model: nn.Module, seed: int, scale: float = 30.0) -> None:
    model.zero_grad()
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    (model(inputs).square().sum() * scale).backward()


class Operations(TorchDispatchMode):
    """Note the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def run(make: Any, rule: Any, steps: int = 5, **options: Any) -> tuple[Any, Any, nn.Module]:
    model = model_of()
    optimizer = make(model.parameters(), fused=True)
    handle = kk.torch.attach(optimizer, model, clip=rule, **options)
    for seed in range(steps):
        backward(model, seed)
        optimizer.step()
        assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
    return handle, optimizer, model


@fused
def test_a_folded_step_is_the_clipped_step(make: Any) -> None:
    handle, optimizer, model = run(make, kk.clip.ByGlobalNorm(1.0))
    other = model_of()
    theirs = make(other.parameters(), fused=True)
    for seed in range(5):
        backward(other, seed)
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        theirs.step()
    assert handle.last.engaged
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
        # The gradients that remain are the clipped ones, as a reader of `.grad` expects.
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


@fused
def test_a_folded_factor_multiplies_nothing_and_an_idle_limit_neither(make: Any) -> None:
    for limit, engaged in ((1.0, True), (1e9, False)):
        model = model_of()
        optimizer = make(model.parameters(), fused=True)
        handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(limit))
        backward(model, 0)
        with Operations() as operations:
            optimizer.step()
        assert handle.last is not None and handle.last.engaged is engaged
        assert not [name for name in operations.names if "mul_" in name and "foreach" in name]


def test_a_factor_that_is_not_one_number_is_multiplied() -> None:
    handle, _, model = run(FUSED["sgd"], kk.clip.ByNorm(0.1), steps=1)
    for parameter in model.parameters():
        assert float(parameter.grad.norm()) <= 0.1 * (1 + 1e-6)
    assert handle.last.engaged


def test_attributes_are_put_back_after_a_step_that_failed() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1e-3))
    broken = optimizer.register_step_pre_hook(_fail)
    backward(model, 0)
    with pytest.raises(RuntimeError, match="no step today"):
        optimizer.step()
    assert hasattr(optimizer, "grad_scale")
    broken.remove()
    handle.detach()
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))


def _fail(*_: Any) -> None:
    raise RuntimeError("no step today")


def test_a_factor_too_small_for_float32_is_not_folded() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1e-3))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e34)
    optimizer.step()
    moved = [(a - b).detach() for a, b in zip(model.parameters(), before, strict=True)]
    assert handle.last is not None and handle.last.post == pytest.approx(1e-3)
    assert float(torch.stack([one.norm() for one in moved]).norm()) == pytest.approx(1e-3, rel=1e-2)


RULES = {
    "global": kk.clip.ByGlobalNorm(1.0),
    "learning": kk.clip.EMARatio(1.2),
    "zclip": kk.clip.Chain(kk.clip.ZClip(warmup=2), kk.clip.ByGlobalNorm(5.0)),
    "per tensor": kk.clip.ByNorm(0.5),
    "per unit": kk.clip.AGC(0.05),
    "by value": kk.clip.ByValue(0.2),
    "chain": kk.clip.Chain(kk.clip.ByValue(0.2), kk.clip.ByGlobalNorm(0.5)),
    "groups": kk.clip.Groups({"0.*": kk.clip.ByNorm(0.1)}, default=kk.clip.ByGlobalNorm(1.0)),
    "auto": kk.clip.AutoClip(50.0),
    "spikes": kk.clip.SPAM(2.0, warmup=1),
    "adagc": kk.clip.AdaGC(warmup=2),
    "skip spikes": kk.clip.SkipSpikes(1.0, warmup=2, window=8),
}


class Syncs(TorchDispatchMode):
    """Count how often a number of a tensor is asked for on the host, or tensors come there."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("make", [FUSED["adamw"], FUSED["sgd"]], ids=["adamw", "sgd"])
def test_on_a_device_the_same_is_decided_without_the_host(
    make: Any, rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*, device: bool) -> tuple[list[str], nn.Module, dict[str, Any]]:
        model = model_of()
        optimizer = make(model.parameters(), fused=True)
        with monkeypatch.context() as patch:
            if device:
                patch.setattr(norms, "on_cpu", lambda tensor: False)
            handle = kk.torch.attach(optimizer, model, clip=rule, stop_after=3)
            said = []
            for seed in range(9):
                backward(model, seed, scale=30.0 if seed != 7 else 3000.0)
                if seed in (4, 5):
                    model[0].weight.grad[0, 0] = float("nan")
                with Syncs() as syncs:
                    optimizer.step()
                assert not device or syncs.count == 0
                said.append(str(handle.last))
            return said, model, handle.state_dict()["clip"]

    host, theirs, expected = train(device=False)
    found, ours, state = train(device=True)
    assert found == host
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, list) and value and isinstance(value[0], str):
            assert state[key] == value
        elif key != "second_moment":
            assert state[key] == pytest.approx(value, rel=1e-6), key


def test_on_a_device_bad_steps_in_a_row_still_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    monkeypatch.setattr(norms, "on_cpu", lambda tensor: False)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0), stop_after=3)
    with pytest.raises(NonFinite, match="first in 0.weight"):
        for seed in range(6):
            backward(model, seed)
            model[0].weight.grad[0, 0] = float("nan")
            optimizer.step()
    assert seed in (2, 3)


@pytest.mark.parametrize("overflow", [False, True])
def test_on_a_device_an_amp_scaler_and_the_clip_share_one_pass(
    overflow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*, device: bool) -> tuple[nn.Module, Any]:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        with monkeypatch.context() as patch:
            if device:
                patch.setattr(norms, "on_cpu", lambda tensor: False)
            handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
            for seed in range(4):
                optimizer.zero_grad()
                inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
                scaler.scale(model(inputs).square().sum()).backward()
                if overflow and seed == 2:
                    model[0].weight.grad[0, 0] = float("inf")
                scaler.step(optimizer)
                scaler.update()
            return model, handle.state_dict()["clip"]

    ours, state = train(device=True)
    theirs, expected = train(device=False)
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert state == expected
    assert state["accepted"] == (3 if overflow else 4) and state["bad_in_a_row"] == 0


def test_a_first_step_that_is_skipped_leaves_no_unwritten_momentum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    monkeypatch.setattr(norms, "on_cpu", lambda tensor: False)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    backward(model, 0)
    model[0].weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert not optimizer.state
    backward(model, 1)
    optimizer.step()
    for parameter in model.parameters():
        torch.testing.assert_close(
            optimizer.state[parameter]["momentum_buffer"], parameter.grad, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize(
    "rule",
    [
        kk.clip.Chain(kk.clip.AGC(0.05), kk.clip.ByNorm(0.2)),
        kk.clip.Chain(kk.clip.ByNorm(0.2), kk.clip.AGC(0.05)),
        kk.clip.Chain(kk.clip.Groups({"0.weight": kk.clip.AGC(0.05)}), kk.clip.ByValue(0.05)),
        kk.clip.Chain(kk.clip.ByGlobalNorm(1.0), kk.clip.EMARatio(1.1)),
    ],
    ids=str,
)
def test_on_a_device_stages_may_have_numbers_of_any_count(
    rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    for device in (False, True):
        with monkeypatch.context() as patch:
            if device:
                patch.setattr(norms, "on_cpu", lambda tensor: False)
            models.append(run(FUSED["adamw"], rule)[2])
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device", [False, True])
def test_a_checkpoint_of_an_optimizer_that_is_not_fused_ends_the_folding(
    device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device:
        monkeypatch.setattr(norms, "on_cpu", lambda tensor: False)
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(0.1))
    optimizer.load_state_dict(torch.optim.Adam(model_of().parameters(), lr=0.01).state_dict())
    backward(model, 0)
    optimizer.step()
    assert handle.last is not None and handle.last.post == pytest.approx(0.1)


@pytest.mark.parametrize("device", [False, True])
def test_nothing_is_left_on_the_optimizer_after_too_many_bad_steps(
    device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device:
        monkeypatch.setattr(norms, "on_cpu", lambda tensor: False)
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0), stop_after=2)
    good = handle.state_dict()
    with pytest.raises(NonFinite, match="in a row with non-finite gradients, first in 0.weight"):
        for seed in range(5):
            backward(model, seed)
            model[0].weight.grad[0, 0] = float("nan")
            optimizer.step()
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
    handle.load_state_dict(good)
    backward(model, 9)
    optimizer.step()
    assert handle.last is not None and handle.last.action == "clipped"
