"""Recovery: masks hold, the teacher stays, the judge decides, and a stopped one continues bit for bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import karikomi as kk
from karikomi.errors import BadFile, InvalidArgument, KarikomiError, NonFinite, Unsupported

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )


def batches(count: int = 8) -> Batches:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 16, 6, generator=generator)
    return [(one, one[:, :3].argmax(1)) for one in inputs]


def pruned(seed: int = 0) -> tuple[nn.Sequential, Any]:
    module = network(seed)
    return module, kk.torch.prune_(module, sparsity=0.6)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(bits(one[k]) == bits(other[k]) for k in one)


def recover(module: nn.Module, masks: Any, **given: Any) -> Any:
    given = {"data": batches(), "loss": F.cross_entropy, "epochs": 2, "rate": 0.01, **given}
    return kk.torch.recover_(module, masks, **given)


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_masks_hold_and_the_loss_falls(taught: bool, own: bool) -> None:
    module, masks = pruned()
    before = state(module)
    given: dict[str, Any] = {"teacher": network().requires_grad_(False)} if taught else {}
    if own:
        # Moments of what is masked would move it if they were left.
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        F.cross_entropy(module(batches()[0][0]), batches()[0][1]).backward()
        optimizer.step()
        given |= {"optimizer": optimizer, "rate": None}
    found = recover(module, masks, epochs=6, **given)
    assert found.kept and found.before is None and len(found.losses) == 6
    assert found.losses[-1] < 0.9 * found.losses[0]
    for name, mask in masks.items():
        weight = module.state_dict()[name]
        assert not weight[~mask].any() and not torch.equal(weight, before[name])
    assert all(one.grad is None for one in module.parameters())
    if own:
        assert optimizer.param_groups[0]["lr"] == 0.05
        for name, mask in masks.items():
            moment = optimizer.state[dict(module.named_parameters())[name]]["momentum_buffer"]
            assert not moment[~mask].any() and moment[mask].any()


def test_a_shrunk_network_is_trained_without_masks(tmp_path: Path) -> None:
    dense = network()
    small, _ = kk.torch.shrink(dense, batches()[0][0], width=0.5)
    other = copy.deepcopy(small)
    given: dict[str, Any] = {"teacher": dense, "judge": lambda module: -judged(module)}
    found = recover(small, None, epochs=6, checkpoint=tmp_path / "c.pt", **given)
    assert found.kept and found.after > found.before
    assert found == recover(other, None, epochs=6, checkpoint=tmp_path / "c.pt", **given)
    assert same(state(small), state(other))


def judged(module: nn.Module) -> float:
    return float(F.cross_entropy(module(batches()[0][0]), batches()[0][1]))


def test_the_rate_falls_by_a_cosine_to_zero() -> None:
    module, masks = pruned()
    seen: list[float] = []

    class Noted(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    optimizer = Noted(module.parameters(), lr=0.2)
    recover(module, masks, optimizer=optimizer, rate=None, data=batches(4))
    wanted = [0.1 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert seen == pytest.approx(wanted) and optimizer.param_groups[0]["lr"] == 0.2


def test_a_step_with_a_teacher_is_the_published_formula() -> None:
    module, teacher = nn.Linear(3, 4), nn.Linear(3, 4)
    masks = kk.torch.prune_(module, sparsity=0.25)
    inputs, targets = torch.randn(5, 3), torch.randint(4, (5,))
    expected = copy.deepcopy(module)
    outputs = expected(inputs)
    soft = F.softmax(teacher(inputs) / 3.0, 1).detach()
    divergence = F.kl_div(F.log_softmax(outputs / 3.0, 1), soft, reduction="batchmean")
    loss = 0.7 * F.cross_entropy(outputs, targets) + 0.3 * 9.0 * divergence
    loss.backward()
    found = recover(
        *(module, masks),
        data=[(inputs, targets)],
        epochs=1,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.5),
        rate=None,
        teacher=teacher,
        temperature=3.0,
        weight=0.3,
    )
    assert found.losses[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert expected.weight.grad is not None and expected.bias.grad is not None
    weight = (expected.weight - 0.5 * expected.weight.grad) * masks["weight"]
    torch.testing.assert_close(module.weight, weight)
    torch.testing.assert_close(module.bias, expected.bias - 0.5 * expected.bias.grad)


def test_the_teacher_is_in_eval_mode_and_stays_as_it_is() -> None:
    module, masks = pruned()
    teacher, modes = network(), []
    teacher[3].eval()
    teacher.register_forward_hook(
        lambda one, *_: modes.append((one.training, torch.is_grad_enabled()))
    )
    before = state(teacher)
    recover(module, masks, teacher=teacher)
    assert set(modes) == {(False, False)} and len(modes) == 16
    assert same(before, state(teacher)) and all(one.grad is None for one in teacher.parameters())
    assert teacher.training and not teacher[3].training


def test_inputs_alone_suffice_for_the_teacher_alone() -> None:
    module, masks = pruned()
    data = [inputs for inputs, _ in batches()]
    found = recover(module, masks, data=data, loss=None, teacher=network(), weight=1.0, epochs=8)
    assert found.losses[-1] < 0.7 * found.losses[0]
    with pytest.raises(InvalidArgument, match="no targets"):
        recover(module, masks, data=data, teacher=network())


@pytest.mark.parametrize("axis", [1, -1])
def test_the_axis_of_the_classes_has_to_be_said_where_there_are_more_than_two(axis: int) -> None:
    module = nn.Conv2d(2, 3, 1)
    masks = kk.torch.prune_(module, sparsity=0.5)
    teacher, inputs = nn.Conv2d(2, 3, 1), torch.randn(4, 2, 5, 6)
    given = {"data": [inputs], "loss": None, "teacher": teacher, "weight": 1.0, "epochs": 1}
    with pytest.raises(InvalidArgument, match=r"more than two axes.*axis=1.*axis=-1"):
        recover(module, masks, **given)
    with torch.no_grad():
        cold, warm = (F.log_softmax(one(inputs) / 2.0, axis) for one in (module, teacher))
    wanted = 4.0 * float((warm.exp() * (warm - cold)).sum(axis).mean())
    found = recover(module, masks, **given, axis=axis)
    assert found.losses[0] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("after", [1.0, 0.5, 0.4, float("nan"), float("inf")])
def test_the_judge_decides_and_what_is_worse_is_put_back_bit_for_bit(after: float) -> None:
    module, masks = pruned()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    before, answers, seen = state(module), iter([0.5, after]), []

    def judge(one: nn.Module) -> float:
        seen.append((one.training, torch.is_grad_enabled(), float(torch.rand(()))))
        return next(answers)

    found = recover(module, masks, judge=judge, optimizer=optimizer, rate=None)
    assert found.before == 0.5 and found.kept == (after in (1.0, 0.5))
    assert same(before, state(module)) != found.kept
    assert bool(optimizer.state) == found.kept
    assert seen[0] == seen[1] and seen[0][:2] == (False, False)
    assert ("not kept" in str(found)) != found.kept


@pytest.mark.parametrize(("after", "kept"), [(0.4, True), (0.5, True), (0.6, False)])
def test_an_error_is_judged_by_its_own_goal(after: float, kept: bool) -> None:
    module, masks = pruned()
    answers = iter([0.5, after])
    found = recover(module, masks, judge=lambda module: next(answers), goal="min")
    assert found.kept is kept
    with pytest.raises(InvalidArgument, match="unknown goal; got 'low'; allowed: max, or min"):
        recover(module, masks, goal="low")


@pytest.mark.parametrize("training", [False, True])
def test_modes_random_numbers_and_rates_are_as_before(training: bool) -> None:
    module, masks = pruned()
    module.train(training)
    module[1].eval()
    means = state(module)["1.running_mean"]
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    recover(module, masks)
    assert torch.equal(torch.rand(3), wanted)
    assert [one.training for one in module] == [training, False, *[training] * 3]
    # A norm held in eval mode inside of a module in training mode is meant to be held.
    assert torch.equal(state(module)["1.running_mean"], means) == training


class Stopped(Exception):
    """Somebody pulls the plug."""


def stopping(at: int) -> Any:
    calls = 0

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > at:
            raise Stopped
        return F.cross_entropy(outputs, targets)

    return loss


def loader(kind: str) -> Any:
    pairs = batches()
    if kind == "list":
        return pairs
    whole = TensorDataset(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
    generator = torch.Generator().manual_seed(3) if kind != "loader" else None
    if kind == "batches":
        order = RandomSampler(whole, generator=generator)
        return DataLoader(whole, batch_sampler=BatchSampler(order, 16, drop_last=False))
    return DataLoader(whole, batch_size=16, shuffle=True, generator=generator)


@pytest.mark.parametrize("kind", ["list", "loader", "generator", "batches"])
@pytest.mark.parametrize("at", [5, 20, 39])
def test_killed_and_resumed_is_not_stopped(kind: str, at: int, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "epochs": 5,
        "teacher": network(1),
        "clip": kk.clip.ZClip(),
        "bound": kk.bound.MaxNorm(1.0),
        "judge": lambda one: -float(F.cross_entropy(one(batches()[0][0]), batches()[0][1])),
    }
    straight, masks = pruned()
    wanted = recover(straight, masks, data=loader(kind), **given)
    module, masks = pruned()
    before = state(module)
    path = tmp_path / "recovery.pt"
    with pytest.raises(Stopped):
        recover(module, masks, **given | {"loss": stopping(at)}, data=loader(kind), checkpoint=path)
    assert same(before, state(module)) and path.exists() == (at >= 8)
    again, masks = pruned()
    found = recover(again, masks, data=loader(kind), **given, checkpoint=path)
    assert found == wanted and same(state(straight), state(again))
    # Done is done: nothing is trained any more.
    third, masks = pruned()
    finished = recover(
        third, masks, data=loader(kind), **given | {"loss": stopping(0)}, checkpoint=path
    )
    assert finished == wanted and same(state(straight), state(third))


def test_a_checkpoint_goes_on_in_another_memory_format(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3))
        return module, kk.torch.prune_(module, sparsity=0.5)

    data = [(torch.randn(8, 3, 4, 4), torch.randint(3, (8,))) for _ in range(4)]
    straight, masks = make()
    wanted = recover(straight, masks, data=data)
    module, masks = make()
    with pytest.raises(Stopped):
        recover(module, masks, data=data, loss=stopping(5), checkpoint=tmp_path / "c")
    module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = recover(module, masks, data=data, checkpoint=tmp_path / "c")
    assert found.losses == pytest.approx(wanted.losses, rel=1e-5)
    torch.testing.assert_close(state(module), state(straight))


def test_the_checkpoint_is_plain_data_and_of_one_recovery(tmp_path: Path) -> None:
    path = tmp_path / "recovery.pt"
    module, masks = pruned()
    recover(module, masks, checkpoint=path)
    saved = torch.load(path, weights_only=True)
    assert len(saved["losses"]) == 2 and [one.name for one in tmp_path.iterdir()] == [path.name]
    other, others = pruned(seed=1)
    with pytest.raises(Unsupported, match="another recovery.*module"):
        recover(other, others, checkpoint=path)
    module, masks = pruned()
    before = state(module)
    for given in ({"epochs": 3}, {"rate": 0.02}, {"seed": 1}, {"clip": kk.clip.ByNorm(1.0)}):
        with pytest.raises(Unsupported, match="another recovery"):
            recover(module, masks, checkpoint=path, **given)
    del saved["weights"]["0.weight"]
    torch.save(saved, path)
    with pytest.raises(BadFile, match="does not fit"):
        recover(module, masks, checkpoint=path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(BadFile, match="not a checkpoint of a recovery"):
            recover(module, masks, checkpoint=path)
    assert same(before, state(module))


class Stream:
    """Shuffled batches that do not say how many they are."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __iter__(self) -> Iterator[Any]:
        pairs = batches()
        return iter([pairs[i] for i in torch.randperm(len(pairs), generator=self.generator)])


class Counted(Stream):
    """The same, saying it."""

    def __len__(self) -> int:
        return 8


def test_an_iterable_without_a_length_is_counted_and_left_as_it_was() -> None:
    one, masks = pruned()
    other, _ = pruned()
    assert recover(one, masks, data=Stream()) == recover(other, masks, data=Counted())
    assert same(state(one), state(other))


def test_an_error_puts_everything_back() -> None:
    module, masks = pruned()
    module.eval()
    before = state(module)
    with pytest.raises(Stopped):
        recover(module, masks, loss=stopping(3))
    with pytest.raises(NonFinite, match="in a row"):
        recover(module, masks, data=[(x * math.nan, y) for x, y in batches(12)])
    assert same(before, state(module)) and not any(one.training for one in module.modules())
    found = recover(module, masks)
    assert found.kept and not same(before, state(module))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no loss": ({"loss": None}, "no loss to train with"),
    "epochs": ({"epochs": 0}, "epochs is a whole number"),
    "seed": ({"seed": -1}, "seed is a whole number"),
    "rate": ({"rate": -0.1}, "rate is out of range"),
    "temperature": ({"temperature": 0.0}, "temperature is out of range"),
    "weight": ({"weight": 1.5}, "weight is out of range"),
    "weight nan": ({"weight": math.nan}, "weight is out of range"),
    "alone": ({"teacher": nn.Linear(1, 1), "weight": 1.0}, "have no effect"),
    "teacher": ({"teacher": "dense"}, "the teacher is a module"),
    "one batch": ({"data": batches()[0]}, "iterable of batches"),
    "iterator": ({"data": iter(batches())}, "iterable of batches"),
    "no batches": ({"data": []}, "no batches"),
    "masks": ({"masks": {}}, "masks takes a Masks"),
    "vector": ({"loss": lambda o, t: F.cross_entropy(o, t, reduction="none")}, "0-d tensor"),
    "shapes": ({"teacher": nn.Linear(6, 4)}, "compares tensors of logits"),
    "classes": ({"teacher": network(), "axis": 2}, "two or more classes"),
    "optimizer": ({"optimizer": "adam", "rate": None}, "not a torch optimizer"),
    "clip": ({"clip": "norm"}, "clip"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_requests_are_one_line_and_leave_the_network(kind: str) -> None:
    given, words = BAD[kind]
    module, masks = pruned()
    before = state(module)
    with pytest.raises(KarikomiError, match=words) as caught:
        recover(**{"module": module, "masks": masks, **given})
    assert "\n" not in str(caught.value) and same(before, state(module))


def test_a_teacher_that_would_be_trained_is_refused() -> None:
    module, masks = pruned()
    shallow = nn.Sequential(*module)
    for teacher in (module, shallow):
        with pytest.raises(Unsupported, match=r"shares this tensor with the module.*deepcopy"):
            recover(module, masks, teacher=teacher)
    with pytest.raises(InvalidArgument, match="its own learning rate"):
        recover(module, masks, optimizer=torch.optim.SGD(module.parameters(), lr=0.1))
    with pytest.raises(Unsupported, match="every parameter is frozen"):
        recover(module.requires_grad_(False), masks)


# --- the whole chain, on real digits ---


@cache
def digits() -> tuple[torch.Tensor, ...]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    inputs = torch.from_numpy(((images[order] - 8.0) / 8.0).astype(np.float32))
    targets = torch.from_numpy(labels[order])
    return (
        *(inputs[:1000], targets[:1000]),
        *(inputs[1000:1300], targets[1000:1300]),
        *(inputs[1300:], targets[1300:]),
    )


def digit_batches() -> Any:
    inputs, targets = digits()[:2]
    return DataLoader(TensorDataset(inputs, targets), batch_size=50, shuffle=True)


def accuracy(module: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    was = module.training
    with torch.no_grad():
        right = module.eval()(inputs).argmax(1) == targets
    module.train(was)
    return float(right.float().mean())


def digit_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    )


def train(module: nn.Module, epochs: int, **attached: Any) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    handle = kk.torch.attach(optimizer, module, **attached)
    torch.manual_seed(0)
    for _ in range(epochs):
        for inputs, targets in digit_batches():
            optimizer.zero_grad()
            F.cross_entropy(module(inputs), targets).backward()
            optimizer.step()
    return handle


@cache
def dense_digits() -> nn.Sequential:
    module = digit_network()
    train(module, 20).detach()
    return module


def test_digits_at_90_percent_by_sensitivity_come_back_within_two_points() -> None:
    held, final = digits()[2:4], digits()[4:]
    dense = dense_digits()
    module = copy.deepcopy(dense)
    assert accuracy(dense, *final) > 0.94

    def judge(one: nn.Module) -> float:
        return accuracy(one, *held)

    curves = kk.torch.sensitivity(module, judge)
    masks = kk.torch.prune_(module, 0.9, allocation="sensitivity", facts={"curve": curves})
    assert masks.sparsity == pytest.approx(0.9, abs=1e-4)
    damaged = accuracy(module, *final)
    found = kk.torch.recover_(
        *(module, masks, digit_batches()),
        loss=F.cross_entropy,
        epochs=15,
        rate=2e-3,
        teacher=dense,
        judge=judge,
    )
    assert (
        found.kept and found.after is not None and found.before == pytest.approx(damaged, abs=0.1)
    )
    assert accuracy(module, *final) >= accuracy(dense, *final) - 0.02
    assert accuracy(module, *final) > damaged + 0.05
    for name, mask in masks.items():
        assert not module.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("score", ["snip", "synflow"])
def test_pruned_at_initialisation_and_trained_through_attach(score: str) -> None:
    module = digit_network()
    data = list(digit_batches())
    masks = kk.torch.prune_(module, 0.9, score=score, data=data, loss=F.cross_entropy)
    assert not masks.emptied and accuracy(module, *digits()[4:]) < 0.4
    handle = train(module, 20, prune=masks, clip=kk.clip.ByGlobalNorm(5.0))
    assert handle.sparsity == masks.sparsity == pytest.approx(0.9, abs=1e-4)
    for name, mask in masks.items():
        assert not module.get_parameter(name)[~mask].any()
    assert accuracy(module, *digits()[4:]) > 0.9
