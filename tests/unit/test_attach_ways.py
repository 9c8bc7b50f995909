"""The ways people train: several optimizers, GANs, compiled models, steps inside backward, updates."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import karikomi as kk
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.rule import Decision, Quantity, Scope, Stateless, leave
from karikomi.torch.attachment import limit_warnings


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def backward(model: nn.Module, seed: int, scale: float = 30.0) -> None:
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    (model(inputs).square().sum() * scale).backward()


def assert_close(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def two(model: nn.Sequential) -> list[torch.optim.Optimizer]:
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    return [first, torch.optim.AdamW(model[2].parameters(), lr=0.01)]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_several_optimizers_share_one_joint_norm(order: tuple[int, int]) -> None:
    ours, theirs = model_of(), model_of()
    mine, others = two(ours), two(theirs)
    handle = kk.torch.attach(mine, ours, clip=kk.clip.ByGlobalNorm(1.0), bound=kk.bound.Clamp(0.3))
    for seed in range(4):
        ours.zero_grad()
        theirs.zero_grad()
        backward(ours, seed)
        backward(theirs, seed)
        kk.torch.clip_(theirs, kk.clip.ByGlobalNorm(1.0))
        for place in order:
            mine[place].step()
        for place in order:
            others[place].step()
        kk.torch.bound_(theirs, kk.bound.Clamp(0.3))
    assert handle.steps == 4
    assert handle.last is not None and len(handle.last.names) == 4
    assert_close(ours, theirs)


def test_optimizers_of_a_gan_have_handles_of_their_own() -> None:
    generator, critic = model_of(1), nn.Linear(3, 1)
    both = nn.ModuleDict({"generator": generator, "critic": critic})
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (generator, critic)]
    handles = [
        kk.torch.attach(optimizers[0], both, clip=kk.clip.ByGlobalNorm(1.0)),
        kk.torch.attach(optimizers[1], both, bound=kk.bound.Clamp(0.01)),
    ]
    for step in range(4):
        turn = 0 if step == 3 else 1
        both.zero_grad()
        critic(generator(torch.ones(2, 6))).sum().backward()
        optimizers[turn].step()
    assert [handle.steps for handle in handles] == [1, 3]
    assert all((p.abs() <= 0.01).all() for p in critic.parameters())
    assert handles[0].last.names[0].startswith("generator")  # type: ignore[union-attr]


def test_optimizers_that_hold_the_same_parameter_are_refused() -> None:
    model = model_of()
    pair = [torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)]
    with pytest.raises(Unsupported, match="hold the same parameter"):
        kk.torch.attach(pair, model)
    with pytest.raises(InvalidArgument, match="there is no optimizer"):
        kk.torch.attach([], model)


def in_backward(model: nn.Module, rule: Any) -> list[Any]:
    handles = []
    for parameter in model.parameters():
        own = torch.optim.SGD([parameter], lr=0.1)
        handles.append(kk.torch.attach(own, model, clip=rule))

        def step(p: torch.Tensor, own: torch.optim.Optimizer = own) -> None:
            own.step()
            own.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    return handles


def test_an_optimizer_inside_backward_clips_every_tensor_when_it_steps() -> None:
    ours, theirs = model_of(), model_of()
    handles = in_backward(ours, kk.clip.ByNorm(0.5))
    other = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for seed in range(3):
        backward(ours, seed)
        other.zero_grad()
        backward(theirs, seed)
        kk.torch.clip_(theirs, kk.clip.ByNorm(0.5))
        other.step()
    assert [handle.steps for handle in handles] == [3] * 4
    assert_close(ours, theirs)


def test_a_joint_norm_is_refused_inside_backward() -> None:
    model = model_of()
    in_backward(model, kk.clip.ByGlobalNorm(0.5))
    with pytest.raises(Unsupported, match="inside backward.*per tensor"):
        backward(model, 0)


def test_several_optimizers_inside_backward_are_refused_under_one_handle() -> None:
    model = model_of()
    pair = two(model)
    kk.torch.attach(pair, model, clip=kk.clip.ByNorm(0.5))
    model[2].bias.register_post_accumulate_grad_hook(lambda p: pair[1].step())
    with pytest.raises(Unsupported, match="inside backward.*a handle for each"):
        backward(model, 0)


def test_gradients_that_are_new_since_the_first_of_several_steps_are_clipped_anew() -> None:
    model = model_of()
    first, second = two(model)
    handle = kk.torch.attach([first, second], model, clip=kk.clip.ByGlobalNorm(1.0))
    backward(model, 0)
    first.step()
    model.zero_grad()
    backward(model, 1, scale=3e3)
    second.step()
    assert handle.steps == 2 and handle.last is not None and handle.last.pre > 100.0
    total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert float(total) == pytest.approx(1.0, rel=1e-5)


def test_second_moments_of_our_own_are_unscaled_and_not_shared_with_a_checkpoint() -> None:
    sizes = []
    for fused in (False, True):
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=fused)
        handle = kk.torch.attach(optimizer, model, clip=kk.clip.SPAM(3.0, warmup=1))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for seed in range(4):
            optimizer.zero_grad()
            inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
            scaler.scale(model(inputs).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            if seed == 2:
                kept = handle.state_dict()["clip"]["second_moment"]["0.weight"]
                before = kept.clone()
        assert torch.equal(kept, before)
        assert handle.last is not None
        sizes.append(handle.last.pre)
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)


def test_a_compiled_model_has_the_names_of_the_model() -> None:
    model = model_of()
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    handle = kk.torch.attach(optimizer, compiled, clip=kk.clip.AGC(0.01))
    backward(compiled, 0)
    optimizer.step()
    assert handle.last is not None and handle.last.engaged
    assert set(handle.last.names) == {name for name, _ in model.named_parameters()}


# Updates


def test_block_rms_bounds_the_rms_of_every_update() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.BlockRMS(1.0))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    backward(model, 0)
    optimizer.step()
    assert handle.last_update is not None and handle.last_update.engaged
    assert handle.last is not None and not handle.last.engaged
    sizes = [
        float(((p - b) / 0.5).square().mean().sqrt().detach())
        for p, b in zip(model.parameters(), before, strict=True)
    ]
    gradients = [float(p.grad.square().mean().sqrt()) for p in model.parameters()]
    for size, gradient in zip(sizes, gradients, strict=True):
        assert size == pytest.approx(min(1.0, gradient), rel=1e-4)


def test_an_update_within_the_limit_keeps_its_bits() -> None:
    ours, theirs = model_of(), model_of()
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.01)
    other = torch.optim.Adam(theirs.parameters(), lr=0.01)
    kk.torch.attach(optimizer, ours, update=kk.clip.BlockRMS(100.0))
    for seed in range(3):
        for model, one in ((ours, optimizer), (theirs, other)):
            one.zero_grad()
            backward(model, seed)
            one.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rules_for_gradients_serve_for_updates_too() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    handle = kk.torch.attach(
        optimizer, model, clip=kk.clip.ByGlobalNorm(5.0), update=kk.clip.ByGlobalNorm(2.0)
    )
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    backward(model, 0)
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(2.0 * 0.5, rel=1e-5)
    assert handle.last is not None and handle.last.post == pytest.approx(5.0, rel=1e-5)


def stable_adamw(
    parameters: list[torch.Tensor], gradients: list[torch.Tensor], state: dict[int, Any], step: int
) -> None:
    """One step of the paper's algorithm 2 (Wortsman et al. 2023), per tensor, in plain words."""
    beta1, beta2, rate, decay, eps = 0.9, 0.999, 0.01, 0.1, 1e-8
    for place, (w, g) in enumerate(zip(parameters, gradients, strict=True)):
        m, v = state.setdefault(place, (torch.zeros_like(w), torch.zeros_like(w)))
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g.square()
        state[place] = (m, v)
        corrected_m, corrected_v = m / (1 - beta1**step), v / (1 - beta2**step)
        rms = float((g.square() / corrected_v.clamp_min(eps**2)).mean().sqrt())
        own = rate / max(1.0, rms)
        w -= own * decay * w + own * corrected_m / (corrected_v.sqrt() + eps)


@pytest.mark.parametrize("fused", [False, True])
def test_stable_adamw_is_the_papers(fused: bool) -> None:
    model = model_of().double()
    mine = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=fused)
    handle = kk.torch.attach(optimizer, model, update=kk.clip.StableAdamW())
    state: dict[int, Any] = {}
    engaged = 0
    for step in range(1, 13):
        gradients = []
        for seed, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + seed)
            scale = 40.0 if step == 9 else 1.0
            parameter.grad = torch.randn(parameter.shape, generator=generator).double() * scale
            gradients.append(parameter.grad.clone())
        optimizer.step()
        stable_adamw(mine, gradients, state, step)
        engaged += handle.last_update.engaged  # type: ignore[union-attr]
    assert engaged >= 1
    for ours, theirs in zip(model.parameters(), mine, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-12)


def test_stable_adamw_needs_the_moments_of_adam() -> None:
    model = model_of()
    with pytest.raises(Unsupported, match="needs the second moments that Adam.*got SGD.*BlockRMS"):
        kk.torch.attach(
            torch.optim.SGD(model.parameters(), lr=0.1), model, update=kk.clip.StableAdamW()
        )


def test_a_skipped_update_is_taken_back_whole() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = kk.torch.attach(optimizer, model, update=kk.clip.SkipSpikes(2.0, warmup=3, window=8))
    for seed in range(6):
        optimizer.zero_grad()
        backward(model, seed, scale=1e-3)
        optimizer.step()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    backward(model, 7, scale=1e3)
    optimizer.step()
    assert handle.last_update is not None and handle.last_update.skipped
    for parameter, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)


def test_update_rules_are_refused_where_no_update_is_seen() -> None:
    model = model_of()
    backward(model, 0)
    with pytest.raises(Unsupported, match="BlockRMS acts on a update|BlockRMS acts on an update"):
        kk.torch.clip_(model, kk.clip.BlockRMS(1.0))


def test_a_state_with_updates_continues_bit_for_bit() -> None:
    def trained(stop: int | None) -> list[torch.Tensor]:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        rule = kk.clip.EMARatio(1.1)
        handle = kk.torch.attach(optimizer, model, clip=kk.clip.SPAM(3.0, warmup=1), update=rule)
        for seed in range(10):
            if seed == stop:
                kept = (model.state_dict(), optimizer.state_dict(), handle.state_dict())
                model = model_of(9)
                model.load_state_dict(kept[0])
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
                optimizer.load_state_dict(kept[1])
                handle = kk.torch.attach(
                    optimizer, model, clip=kk.clip.SPAM(3.0, warmup=1), update=rule
                )
                handle.load_state_dict(kept[2])
            optimizer.zero_grad()
            backward(model, seed, scale=1.0 + seed % 3)
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    for one, other in zip(trained(None), trained(4), strict=True):
        assert torch.equal(one, other)


# What a person is told


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for seed in range(count):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()


def test_a_limit_that_always_clips_is_spoken_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit_warnings, "ENOUGH_FOR_OFTEN", 8)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1e-3))
    with pytest.warns(UserWarning, match=r"100\.0% of 8 steps were clipped") as said:
        steps(model, optimizer, 30)
    assert len(said) == 1


def test_a_limit_that_never_clips_is_spoken_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit_warnings, "ENOUGH_FOR_OFTEN", 8)
    monkeypatch.setattr(limit_warnings, "ENOUGH_FOR_SELDOM", 10)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1e9))
    with pytest.warns(UserWarning, match=r"0\.00% of 10 steps.*does next to nothing") as said:
        steps(model, optimizer, 30)
    assert len(said) == 1


@pytest.mark.parametrize(
    "rule",
    [
        None,
        kk.clip.Smooth(1.0),
        kk.clip.Normalize(1.0),
        kk.clip.ByGlobalNorm(math.inf),
        kk.clip.EMARatio(math.inf),
        kk.clip.SkipSpikes(6.0),
        kk.clip.AutoClip(1.0),
    ],
)
def test_rules_that_measure_or_always_act_are_not_spoken_of(
    rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit_warnings, "ENOUGH_FOR_OFTEN", 8)
    monkeypatch.setattr(limit_warnings, "ENOUGH_FOR_SELDOM", 10)
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kk.torch.attach(optimizer, model, clip=rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, optimizer, 20)


def test_weights_that_change_without_a_step_are_spoken_of() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    other = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match="nothing is clipped") as said:
        steps(model, other, 12)
    assert len(said) == 1


def test_accumulation_and_loading_are_not_mistaken_for_a_missing_clip() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(40):
            backward(model, seed)
            if seed % 8 == 7:
                optimizer.step()
                optimizer.zero_grad()
                model.load_state_dict(model.state_dict())


def test_a_finite_gradient_beside_a_tiny_history_is_clipped_and_not_called_bad() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    tiny = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.zeros(3),
        "exp_avg_sq": torch.full((3,), 1e-20),
    }
    optimizer.state[parameter] = tiny
    parameter.grad = torch.full((3,), 1e30)
    outcome, _ = kk.torch.clip_(parameter, kk.clip.SPAM(4.0, warmup=0), optimizer=optimizer)
    assert outcome.action == "clipped" and not outcome.nonfinite
    torch.testing.assert_close(parameter.grad, torch.full((3,), 2e-10))


def test_numpy_refuses_what_judges_gradients_but_scales_updates() -> None:
    update = {"w": torch.ones(2).numpy()}
    with pytest.raises(Unsupported, match="StableAdamW needs second_moment"):
        kk.numpy.clip(update, kk.clip.StableAdamW(), second_moments=update)


# Steps that fail


def failing(optimizer: torch.optim.Optimizer) -> Any:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    return optimizer.register_step_pre_hook(fail)


def test_after_a_raise_the_next_step_is_a_step_like_any_other(tmp_path: Any) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = kk.record.Recorder(tmp_path / "run.jsonl")
    handle = kk.torch.attach(
        optimizer, model, clip=kk.clip.ByGlobalNorm(1.0), nonfinite="raise", record=recorder
    )
    for seed, bad in enumerate([True, False, True, False]):
        optimizer.zero_grad()
        backward(model, seed)
        if bad:
            model[0].weight.grad[0, 0] = math.nan
            with pytest.raises(
                kk.errors.NonFinite, match=r"step \d: non-finite gradient in 0.weight"
            ):
                optimizer.step()
        else:
            optimizer.step()
            assert handle.last is not None and handle.last.action == "clipped"
    recorder.close()
    rows = [row for row in kk.record.read(recorder.path) if row["event"] == "step"]
    assert [row["step"] for row in rows] == [2, 4]


def test_weights_that_were_loaded_after_a_failed_step_are_no_update_of_it() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kk.torch.attach(optimizer, model, update=kk.clip.BlockRMS(0.01))
    hook = failing(optimizer)
    backward(model, 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    hook.remove()
    model.load_state_dict(model_of(5).state_dict())
    optimizer.zero_grad()
    backward(model, 1)
    optimizer.step()
    moved = [
        float((p - q).square().mean().sqrt().detach())
        for p, q in zip(model.parameters(), model_of(5).parameters(), strict=True)
    ]
    assert max(moved) <= 0.01 * 0.1 * (1 + 1e-4)


def test_a_step_that_calls_its_parents_step_is_one_step() -> None:
    class Own(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.AdamW(
        [nn.Parameter(torch.zeros(1))]
    )  # torch hooks the parent's step when it is made
    model = model_of()
    optimizer = Own(model.parameters(), lr=0.1)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.AutoClip(50.0))
    for seed in range(5):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    assert handle.steps == 5 and handle.state_dict()["clip"]["accepted"] == 5
    hook = failing(optimizer)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    hook.remove()
    optimizer.step()
    assert handle.steps == 7


@pytest.mark.parametrize("all_of_them", [True, False])
def test_a_joint_norm_of_gradients_that_are_scaled_in_part_is_refused(all_of_them: bool) -> None:
    model = model_of()
    pair = two(model)
    handle = kk.torch.attach(pair, model, clip=kk.clip.ByGlobalNorm(1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss = model(torch.ones(2, 6)).square().sum()
    scaler.scale(loss).backward()
    if not all_of_them:
        with pytest.raises(Unsupported, match=r"unscale_\(each optimizer\)"):
            scaler.step(pair[0])
        return
    for one in pair:
        scaler.unscale_(one)
    for one in pair:
        scaler.step(one)
    other = model_of()
    other(torch.ones(2, 6)).square().sum().backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])
    assert handle.last is not None and handle.last.pre == pytest.approx(float(expected), rel=1e-5)


def test_a_scale_and_a_factor_too_large_for_float32_are_not_folded() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1e-6))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**110)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    scaler.scale(model(torch.ones(2, 6)).square().sum()).backward()
    scaler.step(optimizer)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-6, rel=0.05)


def test_moments_of_our_own_follow_the_clipped_gradients_of_a_fused_step() -> None:
    kept = []
    for fused in (False, True):
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        rule = kk.clip.Chain(kk.clip.SPAM(1e6, warmup=0), kk.clip.ByGlobalNorm(0.01))
        handle = kk.torch.attach(optimizer, model, clip=rule)
        backward(model, 0)
        optimizer.step()
        kept.append(handle.state_dict()["clip"]["second_moment"]["0.weight"])
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-5, atol=0)


def test_what_cannot_be_recorded_is_refused_before_it_does_harm(tmp_path: Any) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidArgument, match="this is not a recorder"):
        kk.torch.attach(optimizer, model, record="run.jsonl")  # type: ignore[arg-type]
    handle = kk.torch.attach(optimizer, model, record=kk.record.Recorder(tmp_path / "a.jsonl"))
    for facts in ({"norm": 1.0}, {"step": 3}, {"x": object()}):
        with pytest.raises(InvalidArgument, match="Handle.note"):
            handle.note(**facts)
    backward(model, 0)
    optimizer.step()


@pytest.mark.parametrize("rule", [kk.clip.ByValue(0.5), kk.clip.ByNorm(0.5)], ids=str)
def test_a_gradient_whose_entries_share_memory_is_clipped(rule: Any) -> None:
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.tensor([3.0]).expand(4)
    outcome, _ = kk.torch.clip_(parameter, rule)
    expected = 0.5 if isinstance(rule, kk.clip.ByValue) else 0.25
    assert outcome.engaged
    torch.testing.assert_close(parameter.grad, torch.full((4,), expected))


@pytest.mark.parametrize(
    "rules",
    [
        {"clip": kk.clip.AGC(0.01)},
        {"bound": kk.bound.MaxNorm(100.0)},
        {"bound": kk.bound.Clamp(9.0)},
    ],
    ids=str,
)
def test_the_record_has_the_weight_norms(rules: Any, tmp_path: Any) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with kk.record.Recorder(tmp_path / "run.jsonl") as recorder:
        kk.torch.attach(optimizer, model, record=recorder, **rules)
        backward(model, 0)
        optimizer.step()
    row = [row for row in kk.record.read(recorder.path) if row["event"] == "step"][0]
    expected = float(model[0].weight.detach().norm())
    assert row["weights"]["top"]["0.weight"] == pytest.approx(expected, rel=1e-4)


def test_a_rule_of_somebody_elses_needs_no_fields() -> None:
    class Halve(Stateless):
        scope, of = Scope.GLOBAL, Quantity.GRADIENT

        def decide(self, norms: Any, state: Any, *, present: Any, facts: Any, xp: Any) -> Any:
            return Decision(0.5 * xp.ones_like(norms), None, leave(xp)), state

    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = kk.torch.attach(optimizer, model, clip=Halve())
    backward(model, 0)
    optimizer.step()
    assert handle.last is not None and handle.last.factor == pytest.approx(0.5)


def test_a_step_that_was_not_taken_has_no_update_of_the_step_before() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = kk.torch.attach(optimizer, model, update=kk.clip.BlockRMS(1.0))
    steps(model, optimizer, 1)
    assert handle.last_update is not None
    model[0].weight.grad[0, 0] = math.nan
    optimizer.step()
    assert handle.last_update is None
    assert handle.state_dict()["update"]["accepted"] == 1
