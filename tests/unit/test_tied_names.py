"""A tied weight is found by any of its names, in everything that selects tensors of a module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import karikomi as kk
from karikomi.errors import UnknownName, Unsupported


class Tied(nn.Module):
    """A language model whose head is its embedding, and two layers that are one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 4, bias=False)
        self.body = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.body.weight
        self.head = nn.Linear(6, 4)
        self.head.weight = self.embed.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.again(torch.relu(self.body(self.embed(inputs)))))
        return hidden @ self.head.weight


FIRST = "embed.weight"
NAMES = ["embed.weight", "head.weight", "head.w*"]


def changed(act: Callable[[nn.Module], Any]) -> set[str]:
    """Return the names, first ones of tied weights, of what a call changes."""
    model = Tied()
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    act(model)
    return {n for n, tensor in model.named_parameters() if not torch.equal(before[n], tensor)}


@pytest.mark.parametrize("name", NAMES)
def test_the_weight_alone_is_changed(name: str) -> None:
    calls: list[Callable[[nn.Module], Any]] = [
        lambda m: kk.torch.bound_(m, kk.bound.Clamp(0.01), only=name),
        lambda m: kk.torch.prune_(m, 0.5, only=name),
        lambda m: kk.torch.prune_(m, {name: 0.5}),
        lambda m: kk.torch.prune_(m, count={name: 5}),
        lambda m: kk.torch.prune_(m, 0.0, allocation=kk.prune.Fixed({name: 0.5})),
        lambda m: kk.torch.quantize_(m, bits=3, only=name),
    ]
    for number, act in enumerate(calls):
        assert changed(act) == {FIRST}, number


@pytest.mark.parametrize("name", NAMES)
def test_what_is_excluded_stays(name: str) -> None:
    calls: list[Callable[[nn.Module], Any]] = [
        lambda m: kk.torch.bound_(m, kk.bound.Clamp(0.01), exclude=name),
        lambda m: kk.torch.prune_(m, 0.5, exclude=name),
        lambda m: kk.torch.prune_(m, 0.5, pattern="units", exclude=name),
        lambda m: kk.torch.quantize_(m, bits=3, exclude=name),
    ]
    for number, act in enumerate(calls):
        after = changed(act)
        assert FIRST not in after and "body.weight" in after, number


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_a_clip_and_a_penalty(name: str) -> None:
    model = Tied()
    model(torch.ones(2, 6)).square().sum().backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    rule = kk.clip.Groups({name: None}, default=kk.clip.ByValue(1e-6))
    kk.torch.clip_(model, kk.clip.Chain(rule, kk.clip.ByGlobalNorm(1e9)))
    assert model.embed.weight.grad is not None and model.body.weight.grad is not None
    assert torch.equal(model.embed.weight.grad, before[FIRST])
    assert not torch.equal(model.body.weight.grad, before["body.weight"])
    term = kk.torch.penalty(model, kk.prune.L1(1.0), only=name)
    assert float(term.detach()) == pytest.approx(float(model.embed.weight.abs().sum().detach()))


def test_attach_importance_scores_and_training_by_a_further_name() -> None:
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handle = kk.torch.attach(
        optimizer,
        model,
        bound=kk.bound.Clamp(0.02),
        only="head.weight",
        prune=kk.prune.OneShot(0.5, step=1, only="again.weight"),
    )
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    largest = [float(w.detach().abs().max()) for w in (model.head.weight, model.body.weight)]
    assert largest[0] <= 0.02 < largest[1]
    assert handle.masks is not None and list(handle.masks) == ["body.weight"]
    by_hand = {"head.weight": torch.arange(24.0).reshape(4, 6)}
    assert list(kk.torch.prune_(model, count=2, importance=by_hand)) == [FIRST]
    assert list(kk.torch.scores(model, only="head.weight")) == [FIRST]
    training = kk.torch.quantized_training(Tied(), bits=3, only="head.weight")
    assert list(training.finish_()) == [FIRST]


def test_units_shrink_by_any_name_of_their_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 2)
            self.right.weight = self.left.weight

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.out(torch.relu(self.left(inputs)) + torch.relu(self.right(inputs)))

    for only in ("left.*", "right.weight"):
        small, report = kk.torch.shrink(Twice(), torch.randn(3, 6), width=0.5, only=only)
        assert small.out.in_features == 4 and report.max_difference < 1e-5
    with pytest.raises(Unsupported, match="no unit can go"):
        kk.torch.shrink(Twice(), torch.randn(3, 6), width=0.5, exclude="right.weight")


def test_files_and_exports_by_a_further_name(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    kk.save(Tied(), tmp_path / "tied.karikomi")
    assert list(kk.load(tmp_path / "tied.karikomi", only=["head.weight"])) == ["head.weight"]
    example = torch.randn(2, 6)
    done = kk.torch.export_onnx(
        Tied(),
        example,
        tmp_path / "a.onnx",
        activations="int8",
        data=[example],
        only="again.weight",
    )
    assert set(done.weights) == {"body.weight"}


def test_a_name_that_nothing_has_is_an_error_as_before() -> None:
    model = Tied()
    for act in (
        lambda: kk.torch.bound_(model, kk.bound.Clamp(1.0), only="tail.weight"),
        lambda: kk.torch.prune_(model, 0.5, exclude="tail.*"),
        lambda: kk.torch.quantize_(model, bits=8, only=["head.weight", "tail.*"]),
    ):
        with pytest.raises(UnknownName, match="tail"):
            act()
