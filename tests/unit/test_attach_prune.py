"""`attach` with masks and every schedule of sparsity, and checkpoints of all parts together."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import karikomi as kk
from depth import FULL, turns  # noqa: E402
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.prune import NofM, Score, Wanda
from karikomi.prune.schedules.dynamic import SET, RigL
from karikomi.prune.schedules.gradual import Gradual
from karikomi.prune.schedules.iterative import Iterative
from karikomi.prune.schedules.one_shot import OneShot
from karikomi.prune.schedules.pruning_schedule import PruningSchedule
from unit.test_attach import OPTIMIZERS, assert_same, backward, model_of, optimizers, step, weights

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
    masks = kk.torch.prune_(model, sparsity=0.5)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0), prune=masks)
    for seed in range(10):
        step(model, optimizer, seed)
        for name, mask in masks.items():
            pruned = weights(model)[name][~mask]
            assert not pruned.any() and not torch.signbit(pruned).any()
    assert handle.sparsity == 0.5 and _zeros(model) == 36


def test_masked_gradients_do_not_count_in_the_norm() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = kk.torch.prune_(model, sparsity=0.5)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1e6), prune=masks)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer.step()
    assert handle.last is not None and handle.last.pre in (3.0, 4.0)


@optimizers
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_gradual_pruning_reaches_its_sparsity_at_its_last_step(make: Any, sparsity: float) -> None:
    model = model_of()
    optimizer = make(model.parameters())
    rule = Gradual(sparsity, steps=(2, 13), every=4)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0), prune=rule)
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
    rule = Gradual(0.5, steps=(0, 2), every=1)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1.0), prune=rule)
    for seed in range(3):
        step(model, optimizer, seed)
    assert torch.equal(model[0].weight, before["0.weight"]) and _zeros(model) == 12
    assert handle.masks is not None and list(handle.masks) == ["2.weight"]
    reason = "frozen: it requires no gradient" if frozen else "not held by this optimizer"
    assert handle.masks.left_alone["0.weight"] == reason and handle.sparsity == 0.5


def test_given_masks_of_another_optimizer_s_parameters_are_not_held() -> None:
    model = model_of()
    masks = kk.torch.prune_(model, sparsity=0.5)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    handle = kk.torch.attach(optimizer, model, prune=masks)
    assert handle.masks is not None and list(handle.masks) == ["2.weight"]
    assert handle.masks.left_alone["0.weight"] == "not held by this optimizer"
    assert bool((model[0].weight == 1.0).all())
    handle.detach()
    with pytest.raises(Unsupported, match="holds no masked parameter"):
        kk.torch.attach(optimizer, model, prune=kk.torch.Masks({"0.weight": masks["0.weight"]}))


def test_given_masks_keep_their_account() -> None:
    model = model_of()
    masks = kk.torch.prune_(model, sparsity=0.5, data=[torch.randn(4, 6)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = kk.torch.attach(optimizer, model, prune=masks)
    step(model, optimizer, 0)
    assert handle.masks is not None and handle.masks.account == masks.account
    assert handle.masks.account.rows and handle.masks.account.output_error


def test_a_schedule_from_step_zero_prunes_at_the_first_step() -> None:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = Gradual(0.5, steps=(0, 200), initial=0.25)
    handle = kk.torch.attach(optimizer, model, prune=rule)
    step(model, optimizer, 0)
    assert handle.sparsity == pytest.approx(rule.sparsity_at(1), abs=1 / 72) and _zeros(model) > 17
    step(model, optimizer, 1)
    assert handle.sparsity == pytest.approx(rule.sparsity_at(1), abs=1 / 72)


def test_masks_move_to_the_device_of_their_parameter_once(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[torch.Tensor] = []

    def to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Move as to a device of which this machine has none: a copy, unless the tensor is there."""
        if not any(tensor is item for item in there):
            there.append(tensor.clone())
        return there[-1]

    given = torch.ones(3, 2, dtype=torch.bool)
    masks, module = kk.torch.Masks({"weight": given}), nn.Linear(2, 3)
    monkeypatch.setattr(torch.Tensor, "to", to)
    masks.apply_(module)
    masks.apply_(module)
    assert len(there) == 1 and masks["weight"] is there[0] and masks["weight"] is not given


def test_masks_do_not_follow_a_model_to_the_meta_device() -> None:
    """There they would have no values either, and be lost when the model gets its values back."""
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = torch.tensor([[True, False]] * 3)
    handle = kk.torch.attach(optimizer, model, prune=kk.torch.Masks({"weight": kept}))
    blank = nn.Linear(2, 3, device="meta")
    with pytest.raises(Unsupported, match="Masks.apply_: weight: .* has no values"):
        handle.masks.apply_(blank)
    assert handle.masks.not_zero(blank) == {}
    handle.masks.apply_(model)
    assert torch.equal(handle.masks["weight"], kept)


SCHEDULES: dict[str, PruningSchedule] = {
    "one-shot": OneShot(0.6, step=5, score="taylor"),
    "gradual": Gradual(0.7, steps=(1, 9), every=3),
    "movement": Gradual(0.7, steps=(2, 11), every=3, score="movement", allocation="uniform"),
    "fisher": Gradual(0.7, steps=(2, 10), every=4, score="fisher"),
    "units": Gradual(0.5, steps=(2, 8), every=3, pattern="units"),
    "units by gradients": Gradual(0.5, steps=(2, 8), every=3, pattern="units", score="taylor"),
    "1 of 2": OneShot(0.5, step=3, pattern=NofM(keep=1, of=2), score="snip"),
    "iterative": Iterative(0.8, steps=(3, 9), rounds=3),
    "to the start": Iterative(0.8, steps=(3, 9), rounds=3, rewind=0),
    "to step 2": Iterative(0.8, steps=(3, 9), rounds=3, rewind=2),
    "set": SET(0.6, until=11, every=2),
    "rigl": RigL(0.6, until=11, every=2),
}
every_schedule = pytest.mark.parametrize("kind", SCHEDULES)
STEPS = 13


def _network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def _attached(kind: str, name: str) -> tuple[nn.Module, torch.optim.Optimizer, kk.torch.Handle]:
    model = _network()
    optimizer = OPTIMIZERS[name](model.parameters())
    handle = kk.torch.attach(
        optimizer,
        model,
        clip=kk.clip.ByNorm(kk.schedule.Linear(2.0, 0.1, steps=(0, 10))),
        bound=kk.bound.Clamp(kk.schedule.Linear(0.9, 0.4, steps=(0, 10))),
        only="*",
        prune=SCHEDULES[kind],
    )
    return model, optimizer, handle


def _everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    named = {id(one): name for name, one in model.named_parameters()}
    moments = {
        f"{named[id(one)]}.{key}": torch.as_tensor(value).clone()
        for one, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }
    return {**copy.deepcopy(dict(model.state_dict())), **moments}


@every_schedule
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        pytest.param(name, bad, id=f"{name}{' with skipped steps' if bad else ''}")
        for name, first in (("sgd", 0), ("sgd-fused", 1), ("adam-loop", 1), ("adamw-fused", 0))
        for bad in ([(), (3, 5)] if FULL else [((), (3, 5))[first]])
    ],
)
def test_a_loaded_checkpoint_continues_bit_for_bit(kind: str, name: str, bad: Any) -> None:
    model, optimizer, handle = _attached(kind, name)
    # Each schedule is stopped at one place with each optimizer, which are four.
    stops = turns((4, 6, 9) if bad else (1, 7), kind, name)
    saved, ends = {stop: io.BytesIO() for stop in stops}, []
    for seed in range(STEPS):
        if seed in saved:
            parts = (model.state_dict(), optimizer.state_dict(), handle.state_dict())
            whole = dict(zip(("model", "optimizer", "handle"), parts, strict=True))
            torch.save(whole, saved[seed])
        _step(model, optimizer, seed, bad)
        ends.append(_everything(model, optimizer))
    for stop in stops:
        saved[stop].seek(0)
        state = torch.load(saved[stop], weights_only=True)
        resumed, other, second = _attached(kind, name)
        resumed.load_state_dict(state["model"])
        other.load_state_dict(state["optimizer"])
        second.load_state_dict(state["handle"])
        assert second.steps == stop
        for seed in range(stop, STEPS):
            _step(resumed, other, seed, bad)
            assert_same(_everything(resumed, other), ends[seed])
        assert str(second.last) == str(handle.last) and second.sparsity == handle.sparsity
        one, two = handle.state_dict(), second.state_dict()
        assert all(one[part] == two[part] for part in ("clip", "bound", "steps"))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, bad: Any = ()) -> None:
    optimizer.zero_grad()
    backward(model, seed)
    if seed in bad:
        weight = next(model.parameters())
        assert weight.grad is not None
        weight.grad[0, 0] = float("nan")
    optimizer.step()


@every_schedule
@optimizers
def test_what_is_masked_is_zero_in_weights_and_moments_and_the_rest_goes_on(
    kind: str, make: Any
) -> None:
    model = _network()
    optimizer = make(model.parameters())
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByNorm(1.0), prune=SCHEDULES[kind])
    parameters = dict(model.named_parameters())
    for seed in range(STEPS + 5):
        before = weights(model)
        _step(model, optimizer, seed)
        for name, mask in (handle.masks or {}).items():
            moments = [m for m in optimizer.state[parameters[name]].values() if m is not None]
            for one in (parameters[name], *moments):
                if isinstance(one, torch.Tensor) and one.shape == mask.shape:
                    assert not one[~mask].any(), name
    assert handle.masks is not None and 0.3 < handle.sparsity < 0.9
    for name, mask in handle.masks.items():
        if name.endswith("weight") and mask.dim() == 2 and mask.any():
            assert (before[name] != parameters[name])[mask].any(), name


@pytest.mark.parametrize("kind", ["one-shot", "gradual", "movement", "fisher", "iterative"])
def test_each_way_ends_at_its_exact_count(kind: str) -> None:
    model, optimizer, handle = _attached(kind, "sgd")
    for seed in range(STEPS):
        _step(model, optimizer, seed)
    assert handle.masks is not None
    removed = sum(gone for gone, _ in handle.masks.counts().values())
    assert removed == round(SCHEDULES[kind].sparsity * 103)


@pytest.mark.parametrize("kind", ["set", "rigl"])
@pytest.mark.parametrize("alike", [False, True], ids=["", "all weights equal"])
def test_weights_move_and_every_layer_keeps_as_many(kind: str, alike: bool) -> None:
    model, optimizer, handle = _attached(kind, "adamw-fused")
    _step(model, optimizer, 0)
    assert handle.masks is not None
    counts, moved = handle.masks.counts(), 0
    assert sum(gone for gone, _ in counts.values()) == round(0.6 * 103)
    for seed in range(1, STEPS):
        before = handle.masks
        if alike:
            for parameter in model.parameters():
                parameter.data.fill_(0.25)
        _step(model, optimizer, seed)
        assert handle.masks.counts() == counts
        changed = any(not torch.equal(before[name], handle.masks[name]) for name in before)
        moved += changed
        assert not changed or (seed + 1) in (2, 4, 6, 8, 10)
    assert moved >= 2


def test_rigl_grows_where_the_dense_gradient_of_the_step_is_largest() -> None:
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rule = RigL(0.5, until=9, every=4, drop=0.5)
    # A clip of entries would level the gradients, were it before the choice.
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByValue(1e-3), prune=rule)
    for seed in range(4):
        before = handle.masks
        optimizer.zero_grad()
        backward(model, seed)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    assert before is not None and handle.masks is not None
    share = rule.drop_at(4)
    for name, kept in before.items():
        weight = dict(model.named_parameters())[name].detach()
        after = handle.masks[name]
        count = int(share * int(kept.sum()))
        stays = kept & after
        grown = after & ~kept
        assert (
            not weight[grown].any()
            and not optimizer.state[dict(model.named_parameters())[name]]["momentum_buffer"][
                grown
            ].any()
        )
        # What came is worth no less than what stayed away; what went is no larger than what stayed.
        away = ~after
        if grown.any() and away.any():
            assert gradients[name].abs()[grown].min() >= gradients[name].abs()[away].max()
        assert int(grown.sum()) <= count and int(stays.sum()) >= int(kept.sum()) - count
    assert sum(int((handle.masks[n] & ~before[n]).sum()) for n in before) > 0


def test_a_bad_step_moves_nothing_and_the_next_good_one_does() -> None:
    model, optimizer, handle = _attached("rigl", "adam-loop")
    for seed in range(3):
        _step(model, optimizer, seed)
    before, ends = handle.masks, []
    for seed, bad in ((3, True), (4, True), (5, False)):
        _step(model, optimizer, seed, (seed,) if bad else ())
        ends.append(handle.masks)
    assert before is not None and ends[0] is before and ends[1] is before
    assert ends[2] is not None and ends[2].counts() == before.counts()
    assert any(not torch.equal(ends[2][name], before[name]) for name in before)


def test_what_is_not_finite_moves_nothing_where_it_is_set_to_zero() -> None:
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    rule = RigL(0.6, until=11, every=2)
    handle = kk.torch.attach(
        optimizer, model, clip=kk.clip.ByNorm(1.0), prune=rule, nonfinite="zero"
    )
    _step(model, optimizer, 0)
    before = handle.masks
    _step(model, optimizer, 1, (1,))
    assert handle.last is not None and handle.last.action == "zeroed" and handle.masks is before
    _step(model, optimizer, 2)
    assert handle.masks is not before


def test_masks_of_one_s_own_are_where_moving_begins() -> None:
    model, optimizer, handle = _attached("set", "sgd")
    handle.masks = masks = kk.torch.prune_(model, sparsity=0.25)
    _step(model, optimizer, 0)
    assert handle.masks is masks
    _step(model, optimizer, 1)
    assert handle.masks is not masks and handle.masks.counts() == masks.counts()


class _Noting(Score):
    """A score that writes down the facts that it is given."""

    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "squared_gradient", "moved"})

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def of_weights(self, weights: Any, facts: Mapping[str, Any], *, xp: Any) -> Any:
        found = {fact: torch.tensor(one).reshape(3, 4) for fact, one in facts.items()}
        if not self.seen or any(not torch.equal(self.seen[-1][f], found[f]) for f in found):
            self.seen.append(found)
        return xp.abs(weights)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("bad", [None, 3])
def test_scores_by_gradients_get_the_dense_ones_of_the_steps_that_were_taken(
    scale: float | None, bad: int | None, masked: bool
) -> None:
    model = nn.Linear(4, 3, bias=False)
    # The weight whose gradient will be infinite is masked by then, or not.
    model.weight.data[0, 0] = 0.01 if masked else 2.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5, fused=True)
    score = _Noting()
    rule = Gradual(0.75, steps=(2, 6), every=4, initial=0.25, score=score)
    kk.torch.attach(optimizer, model, clip=kk.clip.ByNorm(0.01), prune=rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    shown: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for number in range(1, 7):
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        loss = model(inputs).square().sum()
        (dense,) = torch.autograd.grad(loss, [model.weight], retain_graph=True)
        shown[number] = (dense, model.weight.detach().clone())
        scaler.scale(loss).backward()
        if number == bad:
            model.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    taken = [[s for s in (1, 2) if s != bad], [s for s in (3, 4, 5, 6) if s != bad]]
    assert len(score.seen) == 2
    for round_, steps in enumerate(taken):
        gradients = torch.stack([shown[s][0] for s in steps])
        so_far = [s for part in taken[: round_ + 1] for s in part]
        moved = sum(-0.125 * shown[s][1] * shown[s][0] for s in so_far)
        found = score.seen[round_]
        torch.testing.assert_close(found["gradient"], gradients.mean(0))
        torch.testing.assert_close(found["squared_gradient"], gradients.square().mean(0))
        torch.testing.assert_close(found["moved"], moved)
    # Dense: what is masked by now shows its gradient all the same.
    assert not (score.seen[1]["gradient"] == 0).any() and (model.weight == 0).sum() == 9


@pytest.mark.parametrize("name", ["sgd", "adam-loop", "adamw-fused"])
def test_a_ticket_rewound_to_the_start_trains_like_a_fresh_network_with_its_masks(
    name: str,
) -> None:
    model = _network()
    start = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    handle = kk.torch.attach(
        optimizer,
        model,
        clip=kk.clip.ByNorm(1.0),
        prune=Iterative(0.8, steps=(3, 9), rounds=3, rewind=0),
    )
    for seed in range(9):
        _step(model, optimizer, seed)
    assert handle.masks is not None and handle.state_dict()["prune"] == {"seen": 9}
    fresh = OPTIMIZERS[name](start.parameters())
    kk.torch.attach(fresh, start, clip=kk.clip.ByNorm(1.0), prune=handle.masks)
    assert_same(dict(model.state_dict()), dict(start.state_dict()))
    for seed in range(20, 25):
        _step(model, optimizer, seed)
        _step(start, fresh, seed)
        assert_same(_everything(model, optimizer), _everything(start, fresh))


def test_rewinding_to_a_step_brings_back_its_weights_buffers_and_moments() -> None:
    model, optimizer, handle = _attached("to step 2", "adam-loop")
    kept: dict[str, torch.Tensor] = {}
    for seed in range(9):
        _step(model, optimizer, seed)
        if seed == 1:
            kept = _everything(model, optimizer)
        if seed + 1 in (3, 6, 9):
            now, masks = _everything(model, optimizer), handle.masks
            assert masks is not None
            for name, one in kept.items():
                owner = next((n for n in masks if name == n or name.startswith(f"{n}.")), None)
                if owner is not None and one.shape == masks[owner].shape:
                    one = torch.where(masks[owner], one, 0.0)
                bound = {3: 0.8, 6: 0.65, 9: 0.5}[seed + 1]
                one = one.clamp(-bound, bound) if name in weights(model) else one
                torch.testing.assert_close(now[name], one, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "rule",
    [
        OneShot(0.5, score=Wanda()),
        Gradual(0.5, steps=(0, 9), score="grasp"),
        OneShot(0.5, allocation="owl"),
        OneShot(0.5, score="apoz", pattern="units"),
    ],
)
def test_a_score_that_training_does_not_feed_is_refused_with_the_way_to_go(rule: Any) -> None:
    model = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        Unsupported, match=r"training steps do not show.*prune_\(model, \.\.\., data="
    ):
        kk.torch.attach(optimizer, model, prune=rule)


@pytest.mark.parametrize("kind", ["set", "rigl"])
def test_two_optimizers_and_a_frozen_layer(kind: str) -> None:
    model = _network()
    model[3].requires_grad_(False)
    one = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    two = torch.optim.AdamW([*model[1].parameters(), *model[5].parameters()], lr=0.01)
    handle = kk.torch.attach([one, two], model, prune=SCHEDULES[kind])
    frozen, seen = model[3].weight.clone(), set()
    for seed in range(STEPS):
        for optimizer in (one, two):
            optimizer.zero_grad()
        backward(model, seed)
        one.step()
        two.step()
        assert handle.masks is not None and set(handle.masks) == {"0.weight", "5.weight"}
        seen.add(tuple(gone for gone, _ in handle.masks.counts().values()))
    assert len(seen) == 1 and torch.equal(model[3].weight, frozen)
    assert handle.masks.left_alone["3.weight"] == "not held by this optimizer"


@every_schedule
def test_training_goes_on_to_learn(kind: str) -> None:
    model = _network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    aims = (inputs[:, :3] > 0).long().argmax(1)
    handle = kk.torch.attach(
        optimizer, model, clip=kk.clip.ByGlobalNorm(1.0), prune=SCHEDULES[kind]
    )
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), aims)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert handle.sparsity > 0.3 and losses[-1] < 0.8 * losses[STEPS]


def test_a_state_of_something_else_is_refused() -> None:
    _, _, handle = _attached("gradual", "sgd")
    with pytest.raises(InvalidArgument, match="not the state of a handle"):
        handle.load_state_dict({"steps": 1})
    model, optimizer, _ = _attached("gradual", "sgd")
    step(model, optimizer, 0)
    bare = kk.torch.attach(torch.optim.SGD(model.parameters()), model)
    good = {"steps": 1, "clip": {"attempted": 1}, "bound": None, "masks": None}
    with pytest.raises(InvalidArgument, match="the handle has no such rule"):
        bare.load_state_dict({**good, "clip": None, "bound": good["clip"]})
    with pytest.raises(InvalidArgument, match="another rule"):
        handle.load_state_dict(good)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("gradual", 3),
        ("gradual", {"seen": 1, "more": 2}),
        ("gradual", {"seen": "1"}),
        ("movement", {"seen": 1}),
        ("movement", {"seen": 1, "shown": {"steps": 1, "sums": {}}}),
        ("movement", {"seen": 1, "shown": {"steps": 1, "sums": {"moved": {"0.weight": 3}}}}),
        ("movement", {"seen": 1, "shown": {"steps": 1, "sums": {"moved": 3}}}),
        ("to step 2", {"seen": 4}),
        ("to step 2", {"seen": 1, "rewind": {"weights": {}}}),
        ("to step 2", {"seen": 1, "rewind": {"weights": {}, "buffers": {}, "moments": {}}}),
    ],
)
def test_a_state_of_another_schedule_is_refused_and_changes_nothing(kind: str, wrong: Any) -> None:
    model, optimizer, handle = _attached(kind, "sgd")
    _step(model, optimizer, 0)
    state = handle.state_dict()
    with pytest.raises(InvalidArgument) as caught:
        handle.load_state_dict({**state, "steps": 7, "prune": wrong})
    assert "\n" not in str(caught.value) and handle.steps == 1
    bare = kk.torch.attach(torch.optim.SGD(model.parameters()), model)
    with pytest.raises(InvalidArgument, match="no such rule"):
        bare.load_state_dict(
            {"steps": 1, "clip": None, "bound": None, "masks": None, "prune": wrong}
        )


def test_a_state_without_a_schedule_s_part_goes_on_from_its_steps() -> None:
    model, optimizer, handle = _attached("gradual", "sgd")
    _step(model, optimizer, 0)
    state = {part: one for part, one in handle.state_dict().items() if part != "prune"}
    masks = handle.masks
    handle.load_state_dict(state)
    _step(model, optimizer, 1)
    assert masks is not None and handle.masks is not None
    assert all(torch.equal(masks[name], handle.masks[name]) for name in masks)


@pytest.mark.parametrize("hidden", [float("inf"), float("nan")])
def test_a_move_waits_for_a_step_whose_hidden_gradients_are_finite(hidden: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125)
    rule = RigL(0.5, until=9, every=2)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByNorm(1.0), prune=rule)
    moved = []
    for number in range(1, 5):
        masks = handle.masks
        before = None if masks is None else masks["weight"].clone()
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        if number == 2:
            model.weight.grad[~before] = hidden
        optimizer.step()
        moved.append(before is not None and not torch.equal(before, handle.masks["weight"]))
        assert model.weight.isfinite().all() and handle.masks.sparsity == 0.5
    # Due at 2: made up for at 3.
    assert moved[1:3] == [False, True]
