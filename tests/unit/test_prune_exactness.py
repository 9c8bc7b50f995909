"""Exactly what was asked for, of exactly what was meant: earlier masks, shared norms, exclusions, kinds of layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import karikomi as kk
from karikomi.errors import InvalidArgument, NonFinite, Unsupported

DATA = [torch.randn(32, 12, generator=torch.Generator().manual_seed(1))]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 3)
    return nn.Sequential(*layers)


def removed(masks: kk.torch.Masks) -> int:
    return sum(gone for gone, _ in masks.counts().values())


@pytest.mark.parametrize("score", ["magnitude", "wanda", "obc"])
@pytest.mark.parametrize("second", ["uniform", "erk", "lamp", "isomorphic", "owl", "global"])
@pytest.mark.parametrize("first", ["global", "uniform", "erk"])
def test_earlier_masks_do_not_spoil_the_total(first: str, second: str, score: str) -> None:
    model = net()
    masks = kk.torch.prune_(model, 0.6, allocation=first)
    more = kk.torch.prune_(model, 0.65, allocation=second, masks=masks, score=score, data=DATA)
    assert removed(more) == round(0.65 * (12 * 32 + 320 + 30))


@pytest.mark.parametrize("allocation", ["uniform", "isomorphic", "erk"])
def test_many_small_rounds_end_exactly(allocation: str) -> None:
    model, masks = net(), None
    schedule = kk.prune.Gradual(0.9, steps=(0, 60), every=1, allocation=allocation)
    for step in range(61):
        if schedule.due(step):
            share = schedule.sparsity_at(step)
            masks = kk.torch.prune_(model, share, allocation=allocation, masks=masks)
    assert removed(masks) == round(0.9 * (12 * 32 + 320 + 30))  # type: ignore[arg-type]


class SharedNorm(nn.Module):
    """Two convolutions before one batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.a(x)).relu() + self.norm(self.b(x)).relu()
        return self.last(y.mean((2, 3)))


def test_a_norm_of_several_layers_goes_with_none_of_them() -> None:
    masks = kk.torch.prune_(
        SharedNorm(), width=0.5, pattern="units", data=[torch.randn(4, 3, 2, 2)]
    )
    assert set(masks) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_what_is_excluded_or_foreign_does_not_go_along() -> None:
    masks = kk.torch.prune_(net(), width=0.5, pattern="units", exclude="0.bias")
    assert "0.bias" not in masks and "2.bias" in masks
    model = net()
    weights = [one for name, one in model.named_parameters() if "bias" not in name]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    schedule = kk.prune.OneShot(0.5, step=1, pattern="units")
    handle = kk.torch.attach(optimizer, model, prune=schedule)
    model(DATA[0]).sum().backward()
    optimizer.step()
    assert handle.masks is not None and set(handle.masks) == {"0.weight", "2.weight"}
    assert handle.masks.left_alone["0.bias"] == "not held by this optimizer"


def test_recurrent_and_fused_weights_are_pruned_unless_protected() -> None:
    assert removed(kk.torch.prune_(nn.LSTM(4, 8), 0.5)) == round(0.5 * 4 * 8 * 12)
    attention = nn.MultiheadAttention(8, 2)
    assert "in_proj_weight" not in kk.torch.prune_(attention, 0.5, protect=("attention",))
    chosen = kk.torch.prune_(attention, 0.5)
    assert set(chosen) == {"in_proj_weight", "out_proj.weight"} and chosen.sparsity == 0.5


@pytest.mark.parametrize(
    "asked",
    [
        {"pattern": kk.prune.NofM(keep=1, of=2), "allocation": "erk"},
        {"pattern": "layers", "width": 0.5, "allocation": "uniform"},
        {"pattern": "heads", "width": 0.5, "allocation": "owl"},
    ],
)
def test_an_allocation_that_means_nothing_is_refused(asked: dict[str, object]) -> None:
    with pytest.raises(Unsupported, match="^allocation: "):
        kk.torch.prune_(nn.TransformerEncoderLayer(8, 2, 16), **asked)  # type: ignore[arg-type]


def test_wanda_takes_the_same_share_of_every_output() -> None:
    masks = kk.torch.prune_(net(), 0.5, score="wanda", data=DATA)
    assert [int((~row).sum()) for row in masks["0.weight"]] == [6] * 32


def test_a_strength_that_changes_needs_its_step() -> None:
    model, fading = net(), kk.prune.L1(kk.schedule.Linear(1.0, 0.0, steps=(0, 10)))
    with pytest.raises(InvalidArgument, match="changes from step to step"):
        kk.torch.penalty(model, fading)
    assert float(kk.torch.penalty(model, fading, step=10).detach()) == 0.0
    assert float(kk.torch.penalty(model, kk.prune.L1(1.0)).detach()) > 0.0


def test_a_recovery_that_diverges_puts_everything_back() -> None:
    model = net()
    masks = kk.torch.prune_(model, 0.5)
    before = [one.clone() for one in model.parameters()]
    data = [(DATA[0] * float("nan"), torch.zeros(32, dtype=torch.long))]
    with pytest.raises(NonFinite):
        kk.torch.recover_(model, masks, data, loss=nn.functional.cross_entropy, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
