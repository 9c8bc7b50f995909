"""Recalibration: the statistics are those of the data, and only stay where the judge says so."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.torch.recovery.batch_norm import recalibrate_


def network() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Dropout(0.5), nn.Linear(6, 2)
    )
    module[1].eval()
    return module


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(3.0 + torch.randn(32, 4), torch.randint(2, (32,))) for _ in range(3)]


def states(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def judged(module: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    with torch.no_grad():
        return -float(F.cross_entropy(copy.deepcopy(module).eval()(inputs), targets))


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_statistics_are_the_means_over_batches() -> None:
    module, batches = network(), data()
    found = recalibrate_(module, batches, judge=lambda one: float(one[1].num_batches_tracked))
    assert (found.before, found.after, found.kept) == (0.0, 3.0, True)
    hidden = [module[0](x).detach() for x, _ in batches]
    torch.testing.assert_close(
        module[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0)
    )
    torch.testing.assert_close(
        module[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0)
    )
    assert module[1].momentum == 0.3
    assert [one.training for one in module] == [True, False, True, True]


@pytest.mark.parametrize("after", [0.0, -1.0, float("nan")])
def test_what_does_not_help_is_put_back_bit_for_bit(after: float) -> None:
    module = network()
    before, answers = states(module), iter([0.0, after])
    found = recalibrate_(module, data(), judge=lambda one: next(answers))
    assert not found.kept and found.before == 0.0
    assert equal(before, states(module)) and module[1].momentum == 0.3


@pytest.mark.parametrize(("after", "kept"), [(-1.0, True), (0.0, False), (1.0, False)])
def test_an_error_is_judged_by_its_own_goal(after: float, kept: bool) -> None:
    answers = iter([0.0, after])
    found = recalibrate_(network(), data(), judge=lambda module: next(answers), goal="min")
    assert found.kept is kept


def test_the_judge_sees_eval_mode_and_no_gradient() -> None:
    seen = []

    def judge(module: nn.Module) -> float:
        seen.append((module.training, module[1].training, torch.is_grad_enabled()))
        return 0.0

    recalibrate_(network(), data(), judge=judge)
    assert seen == [(False, False, False)] * 2


def test_held_out_batches_with_a_loss_judge_by_the_mean_over_examples() -> None:
    module, (one, two, three) = network(), data()
    held = [two, (three[0][:5], three[1][:5])]
    inputs, targets = (torch.cat([pair[i] for pair in held]) for i in range(2))
    before = judged(module, inputs, targets)
    found = recalibrate_(module, [one], judge=held, loss=F.cross_entropy)
    assert found.before == pytest.approx(before, rel=1e-5)
    after = judged(module, inputs, targets)
    assert (found.after if found.kept else found.before) == pytest.approx(after, rel=1e-5)
    assert found.kept == (found.after > found.before)


def test_bad_requests_are_one_line_and_leave_the_network() -> None:
    module = network()
    before = states(module)
    with pytest.raises(Unsupported, match="no batch norm"):
        recalibrate_(nn.Linear(2, 2), data(), judge=lambda one: 0.0)
    with pytest.raises(InvalidArgument, match="need a loss"):
        recalibrate_(module, data(), judge=data())
    with pytest.raises(InvalidArgument, match="no targets"):
        recalibrate_(module, data(), judge=[data()[0][0]], loss=F.cross_entropy)
    with pytest.raises(InvalidArgument, match="no batches"):
        recalibrate_(module, [], judge=lambda one: 0.0)
    with pytest.raises(InvalidArgument, match="a batch has no statistics"):
        recalibrate_(module, [torch.zeros(1, 4)], judge=lambda one: 0.0)
    assert equal(before, states(module)) and module[1].momentum == 0.3
    assert [one.training for one in module] == [True, False, True, True]
