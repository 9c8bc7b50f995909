"""`attach`: one line that clips, masks and bounds in any loop as if written by hand."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import karikomi as kk
from karikomi.errors import InvalidArgument, NonFinite, Unsupported

NAN = float("nan")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam-loop": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def backward(model: nn.Module, seed: int, *, scale: float = 30.0) -> torch.Tensor:
    inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    loss = model(inputs).square().sum() * scale
    loss.backward()
    return loss.detach()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> torch.Tensor:
    optimizer.zero_grad()
    loss = backward(model, seed)
    optimizer.step()
    return loss


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@optimizers
@pytest.mark.parametrize(
    "rule", [kk.clip.ByValue(0.1), kk.clip.ByNorm(0.5), kk.clip.ByGlobalNorm(1.0)], ids=str
)
def test_the_loop_stays_as_it_was_and_equals_clipping_by_hand(make: Any, rule: Any) -> None:
    ours, theirs = model_of(), model_of()
    optimizer, other = make(ours.parameters()), make(theirs.parameters())
    handle = kk.torch.attach(optimizer, ours, clip=rule, bound=kk.bound.Clamp(0.3))
    assert handle.last is None
    state = bound_state = None
    for seed in range(5):
        step(ours, optimizer, seed)
        other.zero_grad()
        backward(theirs, seed)
        outcome, state = kk.torch.clip_(theirs, rule, state)
        other.step()
        _, bound_state = kk.torch.bound_(theirs, kk.bound.Clamp(0.3), bound_state)
        assert handle.last is not None and handle.last_bound is not None
        assert str(handle.last) == str(outcome) and handle.last.action == "clipped"
    if optimizer.defaults.get("fused") and isinstance(rule, kk.clip.ByGlobalNorm):
        # Folded into the step: divided by 1 / factor in place of multiplied by the factor.
        for name, tensor in weights(theirs).items():
            torch.testing.assert_close(weights(ours)[name], tensor, rtol=1e-5, atol=1e-6)
    else:
        assert_same(weights(ours), weights(theirs))
    assert handle.steps == 5
    assert all((tensor.abs() <= 0.3).all() for tensor in weights(ours).values())


def _moments(optimizer: torch.optim.Optimizer) -> list[Any]:
    return copy.deepcopy(list(optimizer.state_dict()["state"].values()))


@optimizers
@pytest.mark.parametrize("entry", [NAN, float("inf")])
def test_a_skipped_step_touches_neither_weights_nor_moments(make: Any, entry: float) -> None:
    model = model_of()
    optimizer = make(model.parameters())
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    step(model, optimizer, 0)
    before, moments = weights(model), _moments(optimizer)
    optimizer.zero_grad()
    backward(model, 1)
    model[2].weight.grad[0, 0] = entry
    optimizer.step()
    assert handle.last is not None
    assert (handle.last.action, handle.last.nonfinite) == ("skipped", ("2.weight",))
    assert_same(weights(model), before)
    for old, new in zip(moments, _moments(optimizer), strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(torch.as_tensor(old[k]), torch.as_tensor(new[k])) for k in old)
    step(model, optimizer, 2)
    assert handle.last.action == "clipped"
    assert not any(torch.equal(t, before[name]) for name, t in weights(model).items())


@pytest.mark.parametrize(("policy", "action"), [("zero", "zeroed"), ("pass", "passed")])
def test_other_policies_take_the_step(policy: str, action: str) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByNorm(1.0), nonfinite=policy)
    before = weights(model)
    backward(model, 0)
    model[0].bias.grad[0] = NAN
    optimizer.step()
    assert handle.last is not None and handle.last.action == action
    assert torch.equal(model[0].bias, before["0.bias"]) is (policy == "zero")
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_accumulated_gradients_are_clipped_once_a_step() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    before = weights(model)
    for seed in range(4):
        backward(model, seed)
    joint = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    optimizer.step()
    moved = torch.cat([(weights(model)[n] - t).flatten() for n, t in before.items()])
    assert handle.steps == 1 and handle.last is not None
    assert handle.last.pre == pytest.approx(float(joint), rel=1e-5)
    assert float(moved.norm()) == pytest.approx(1.0, rel=1e-4)


def test_all_parameter_groups_are_clipped_together_and_frozen_ones_not_at_all() -> None:
    model = model_of()
    model[0].bias.requires_grad_(False)
    groups = [
        {"params": [model[0].weight], "lr": 0.1},
        {"params": [model[2].bias, model[2].weight], "lr": 0.01, "weight_decay": 0.1},
    ]
    optimizer = torch.optim.AdamW(groups)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    backward(model, 0)
    joint = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    optimizer.step()
    assert handle.last is not None
    assert set(handle.last.names) == {"0.weight", "2.weight", "2.bias"}
    assert handle.last.pre == pytest.approx(float(joint.norm()), rel=1e-5)


@pytest.mark.parametrize("by_name", [True, False])
@optimizers
def test_a_closure_is_clipped_after_it_was_called(make: Any, by_name: bool) -> None:
    ours, theirs = model_of(), model_of()
    optimizer, other = make(ours.parameters()), make(theirs.parameters())
    handle = kk.torch.attach(optimizer, ours, clip=kk.clip.ByNorm(0.5))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        return backward(ours, 0)

    loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    other.zero_grad()
    expected = backward(theirs, 0)
    kk.torch.clip_(theirs, kk.clip.ByNorm(0.5))
    other.step()
    assert_same(weights(ours), weights(theirs))
    assert torch.equal(loss, expected) and handle.steps == 1


def test_an_optimizer_that_calls_its_closure_twice_is_refused_at_the_second_call() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    model = model_of()
    optimizer = Twice(model.parameters(), lr=0.1)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByNorm(0.5))
    with pytest.raises(Unsupported, match="Twice calls its closure more than once"):
        optimizer.step(lambda: backward(model, 0))


def test_lbfgs_is_refused_with_the_reason() -> None:
    model = model_of()
    with pytest.raises(Unsupported, match="LBFGS.*line search.*curvature"):
        kk.torch.attach(torch.optim.LBFGS(model.parameters()), model)


def test_no_closure_is_no_closure() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    backward(model, 0)
    optimizer.step(closure=None)
    assert handle.steps == 1


def test_detaching_puts_everything_back() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1e-3))
    step(model, optimizer, 0)
    handle.detach()
    handle.detach()
    before = weights(model)
    step(model, optimizer, 1)
    assert handle.steps == 1
    assert float((model[2].weight.detach() - before["2.weight"]).norm()) > 1.0


@pytest.mark.parametrize(("policy", "stop_after", "bad"), [("skip", 3, 3), ("raise", 10, 1)])
def test_bad_steps_in_a_row_raise_and_name_the_tensor(
    policy: str, stop_after: int, bad: int
) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"nonfinite": policy, "stop_after": stop_after}
    kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0), **options)
    for seed in range(bad - 1):
        backward(model, seed)
        model[0].weight.grad[0] = NAN
        optimizer.step()
    step(model, optimizer, 9)
    for attempt in range(bad):
        optimizer.zero_grad()
        backward(model, attempt)
        model[0].weight.grad[0] = NAN
        if attempt < bad - 1:
            optimizer.step()
    before, number = weights(model), 2 * bad
    text = f"step {number}: .*non-finite gradient.* in 0.weight"
    with pytest.raises(NonFinite, match=text):
        optimizer.step()
    assert_same(weights(model), before)


def test_the_schedulers_of_torch_have_nothing_to_complain_of() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    for seed in range(3):
        step(model, optimizer, seed)
        scheduler.step()  # a warning would be an error here
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_rows_go_to_the_record_with_what_was_noted(tmp_path: Any) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with kk.record.Recorder(tmp_path / "r.jsonl") as recorder:
        handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0), record=recorder)
        for seed in range(3):
            optimizer.zero_grad()
            loss = backward(model, seed)
            handle.note(loss=loss, epoch=seed)
            if seed == 1:
                model[0].weight.grad[0] = NAN
            optimizer.step()
        optimizer.step()
    rows = list(kk.record.read(tmp_path / "r.jsonl"))
    assert [row["event"] for row in rows[:3]] == ["start", "run", "names"]
    first, bad, _, last = rows[3:]
    assert rows[1]["optimizer"] == "SGD" and rows[1]["sizes"]["0.weight"] == model[0].weight.numel()
    assert first["step"] == 1 and first["clipped"] and first["epoch"] == 0
    assert first["norm"] > 1.0 and 0 < first["factor"] < 1 and first["loss"] > 0
    assert bad["skipped"] and bad["norm"] is None and bad["nonfinite"] == ["0.weight"]
    assert last["step"] == 4 and "loss" not in last and last["sparsity"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"clip": kk.bound.Clamp(1.0)}, Unsupported, r"attach\(clip\): Clamp acts on a weight"),
        (
            {"bound": kk.clip.ByNorm(1.0)},
            Unsupported,
            r"attach\(bound\): ByNorm acts on a gradient",
        ),
        ({"clip": kk.clip.ByNorm}, InvalidArgument, "not a rule"),
        ({"prune": 0.9}, InvalidArgument, "prune takes a schedule or masks; got float"),
        ({"nonfinite": "ignore"}, InvalidArgument, "unknown policy.*got ignore"),
        ({"stop_after": 0}, InvalidArgument, "stop_after must be >= 1; got 0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments: Any, error: type, text: str) -> None:
    model = model_of()
    with pytest.raises(error, match=text):
        kk.torch.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, **arguments)


def test_what_is_no_optimizer_or_has_foreign_parameters_is_refused() -> None:
    model, other = model_of(), nn.Linear(1, 1)
    with pytest.raises(InvalidArgument, match="not a torch optimizer; got Linear"):
        kk.torch.attach(other, model)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="the optimizer holds 2 parameter"):
        kk.torch.attach(torch.optim.SGD([*model.parameters(), *other.parameters()]), model)


@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize(
    "rule", [kk.clip.ByGlobalNorm(1.0), kk.clip.ByNorm(0.5), kk.clip.ByValue(0.1)]
)
@optimizers
def test_gradients_of_an_amp_scaler_are_clipped_in_their_true_size(
    make: Any, rule: Any, unscale: bool
) -> None:
    ours, theirs = model_of(), model_of()
    optimizer, other = make(ours.parameters()), make(theirs.parameters())
    handle = kk.torch.attach(optimizer, ours, clip=rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(3):
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        scaler.scale(ours(inputs).square().sum() * 30).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
        scaler.update()
        other.zero_grad()
        (theirs(inputs).square().sum() * 30).backward()
        expected, _ = kk.torch.clip_(theirs, rule)
        other.step()
        assert handle.last is not None and handle.last.engaged
        assert handle.last.pre == pytest.approx(expected.pre, rel=1e-4)
    for name, tensor in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_an_overflow_of_the_scaler_is_a_skipped_step(fused: bool) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = weights(model)
    scaler.scale(model(torch.ones(1, 6)).sum()).backward()
    model[0].weight.grad[0] = float("inf")
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert_same(weights(model), before)
    assert scaler.get_scale() == 512.0


def test_without_a_clip_gradients_are_measured_and_bad_steps_skipped(tmp_path: Any) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with kk.record.Recorder(tmp_path / "r.jsonl") as recorder:
        handle = kk.torch.attach(optimizer, model, stop_after=2, record=recorder)
        step(model, optimizer, 0)
        assert handle.last is not None and handle.last.action == "kept" and handle.last.pre > 1
        before = weights(model)
        for attempt in range(2):
            optimizer.zero_grad()
            backward(model, attempt)
            model[0].weight.grad[0] = NAN
            if attempt == 0:
                optimizer.step()
        assert handle.last.action == "skipped"
        assert_same(weights(model), before)
        with pytest.raises(NonFinite, match="2 step.*in a row"):
            optimizer.step()
    rows = [row for row in kk.record.read(tmp_path / "r.jsonl") if row["event"] == "step"]
    assert rows[0]["norm"] > 1 and rows[1]["skipped"]


def test_a_bound_touches_what_the_optimizer_moves_and_says_so() -> None:
    model = model_of()
    for parameter in model.parameters():
        parameter.data.fill_(2.0)
    model[2].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.0)
    handle = kk.torch.attach(optimizer, model, bound=kk.bound.Clamp(1.0))
    optimizer.step()
    largest = {name: float(tensor.max()) for name, tensor in weights(model).items()}
    assert largest == {"0.weight": 2.0, "0.bias": 2.0, "2.weight": 1.0, "2.bias": 2.0}
    assert handle.last_bound is not None and handle.last_bound.names == ("2.weight",)
    assert handle.last_bound.left_alone == {
        "0.weight": "not held by this optimizer",
        "0.bias": "not held by this optimizer",
        "2.bias": "frozen: it requires no gradient",
    }


@pytest.mark.parametrize("policy", ["skip", "raise", "zero", "pass"])
def test_a_step_that_the_scaler_skips_is_no_bad_one_in_a_row(policy: str) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    options: Any = {"stop_after": 2, "nonfinite": policy}
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = weights(model)
    for _ in range(4):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(1, 6)).sum()).backward()
        model[0].weight.grad[0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert handle.last is not None and handle.last.action == "skipped"
    assert handle.last.nonfinite == ("0.weight",)
    state = handle.state_dict()["clip"]
    assert (state["attempted"], state["accepted"], state["bad_in_a_row"]) == (4, 0, 0)
    assert_same(weights(model), before)


def test_a_second_handle_is_refused_until_the_first_is_detached() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByNorm(1.0))
    with pytest.raises(Unsupported, match=r"a handle already.*detach\(\) the other"):
        kk.torch.attach(optimizer, model)
    handle.detach()
    second = kk.torch.attach(optimizer, model)
    handle.detach()
    with pytest.raises(Unsupported, match="a handle already"):
        kk.torch.attach(optimizer, model)
    second.detach()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_is_not_copied(copied: Any) -> None:
    model = model_of()
    handle = kk.torch.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(
        Unsupported, match=r"neither copied nor pickled; save handle.state_dict\(\)"
    ):
        copied(handle)


@pytest.mark.parametrize("stop_after", [None, 1.5, "3", True, -1])
def test_stop_after_is_a_whole_number(stop_after: Any) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidArgument, match="stop_after must be >= 1; got"):
        kk.torch.attach(optimizer, model, stop_after=stop_after)


@pytest.mark.parametrize("part", ["bound", "prune"])
def test_what_can_never_act_is_refused_at_once(part: str) -> None:
    # Once it is imported, modules are asked whether they are sharded.
    importlib.import_module("torch.distributed.fsdp")
    rule = kk.bound.MaxNorm(1.0) if part == "bound" else kk.prune.Gradual(0.5, steps=(0, 2))
    model = model_of()
    parameters = list(model.parameters())
    with pytest.raises(
        InvalidArgument, match="bounds, masks and penalties need the module; got list"
    ):
        kk.torch.attach(torch.optim.SGD(parameters, lr=0.1), parameters, **{part: rule})  # type: ignore[arg-type]
    biases = [model[0].bias, model[2].bias]
    with pytest.raises(Unsupported, match="unit axis|could be pruned"):
        kk.torch.attach(torch.optim.SGD(biases, lr=0.1), model, **{part: rule})
    model.requires_grad_(False)
    with pytest.raises(Unsupported, match="frozen|could be pruned"):
        kk.torch.attach(torch.optim.SGD(parameters, lr=0.1), model, **{part: rule})
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    assert kk.torch.attach(optimizer, parameters, clip=kk.clip.ByNorm(1.0)).last is None  # type: ignore[arg-type]


GOOD = {"steps": 1, "clip": None, "bound": None, "masks": None}


@pytest.mark.parametrize(
    "state",
    [None, 3, [], {**GOOD, "steps": "x"}, {**GOOD, "steps": -1}, {**GOOD, "steps": None}]
    + [{**GOOD, "clip": wrong} for wrong in (3, [1], {}, {1: 2})]
    + [{**GOOD, "masks": wrong} for wrong in (3, [1], {"0.weight": 3}, {"0.weight": {}})]
    + [
        {**GOOD, "clip": {"attempted": bad, "accepted": 0, "bad_in_a_row": 0}} for bad in ("x", [0])
    ],
    ids=repr,
)
def test_a_state_that_makes_no_sense_is_refused_and_changes_nothing(state: Any) -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByNorm(1.0))
    step(model, optimizer, 0)
    before = copy.deepcopy(handle.state_dict())
    with pytest.raises(InvalidArgument):
        handle.load_state_dict(state)
    assert handle.state_dict() == before
