"""Pruning of torch modules: exact counts, exact zeros, and everything else left alone by name."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import karikomi.selection.block_scores as scored
from karikomi.errors import (
    BadFile,
    InvalidArgument,
    KarikomiError,
    NonFinite,
    UnknownName,
    Unsupported,
)
from karikomi.prune import Gradual
from karikomi.torch.modules.prunable import prunable
from karikomi.torch.pruning.in_place import prune_
from karikomi.torch.pruning.masks import Masks


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)
    )


def flat(module: nn.Module) -> np.ndarray:
    """Return the scores of all prunable weights, one after the other."""
    weights = prunable(module)[0].values()
    return np.concatenate([w.detach().float().abs().numpy().ravel() for w in weights])


@settings(max_examples=25)
@given(st.floats(0, 0.999), st.booleans(), st.integers(1, 3))
def test_equals_a_stable_sort_of_all_weights(sparsity: float, ties: bool, threads: int) -> None:
    module = net(threads)
    with torch.no_grad():
        for weight in prunable(module)[0].values():
            weight.copy_(weight.mul(16).round().div(16) if ties else weight)
    scores = flat(module)
    masks = prune_(module, sparsity=sparsity)
    gone = np.argsort(scores, kind="stable")[: round(sparsity * len(scores))]
    expected = np.ones(len(scores), bool)
    expected[gone] = False
    got = np.concatenate([mask.numpy().ravel() for mask in masks.values()])
    np.testing.assert_array_equal(got, expected)


def test_blocks_and_strides_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = net(), net().to(memory_format=torch.channels_last)
    with torch.no_grad():
        for module in (whole, parts):
            for weight in prunable(module)[0].values():
                weight.copy_(weight.mul(8).round().div(8))
            module[4].weight = nn.Parameter(module[4].weight.t().contiguous().t())
    expected = prune_(whole, sparsity=0.7)
    monkeypatch.setattr(scored, "BLOCK", 7)
    got = prune_(parts, sparsity=0.7)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.999])
def test_all_scores_equal_is_still_exact(sparsity: float) -> None:
    layer = nn.Linear(50, 40)
    nn.init.constant_(layer.weight, -0.25)
    masks = prune_(layer, sparsity=sparsity)
    assert masks.counts() == {"weight": (round(2000 * sparsity), 2000)}
    assert int((layer.weight == 0).sum()) == round(2000 * sparsity)


def test_zeros_are_positive_and_the_rest_is_untouched() -> None:
    module = net()
    before = copy.deepcopy(module)
    masks = prune_(module, sparsity=0.6)
    for name, parameter in module.named_parameters():
        old = before.get_parameter(name)
        kept = masks.get(name, torch.ones_like(old, dtype=torch.bool))
        assert torch.equal(parameter[kept], old[kept])
        assert not bool(parameter[~kept].signbit().any()) and not bool(parameter[~kept].any())


def test_minus_zero_goes_before_the_smallest_number() -> None:
    layer = nn.Linear(3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1e-45, -0.0, 1.0]]))
    assert prune_(layer, sparsity=0.34)["weight"].tolist() == [[True, False, True]]


def test_uniform_prunes_each_tensor_alike() -> None:
    masks = prune_(net(), sparsity=0.75, allocation="uniform")
    assert [removed / size for removed, size in masks.counts().values()] == [0.75, 0.75]


def test_only_weights_of_layers_and_reasons_for_the_rest() -> None:
    module = nn.ModuleDict(
        {
            "embed": nn.Embedding(9, 4),
            "rnn": nn.LSTM(4, 4),
            "norm": nn.LayerNorm(4),
            "up": nn.ConvTranspose2d(4, 4, 2),
            "first": nn.Linear(4, 4),
            "second": nn.Linear(4, 4),
            "head": nn.Linear(4, 9),
        }
    )
    module["second"].weight = module["first"].weight
    module["head"].weight = module["embed"].weight
    masks = prune_(module, sparsity=0.5)
    recurrent = ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert list(masks) == [*recurrent, "up.weight", "first.weight"]
    assert masks.left_alone["embed.weight"].startswith("weight of Embedding")
    assert masks.left_alone["first.bias"] == "a bias"
    assert set(masks) | set(masks.left_alone) == set(dict(module.named_parameters()))


def test_selection() -> None:
    masks = prune_(net(), sparsity=0.5, only="*.weight", exclude=["0.*"])
    assert list(masks) == ["4.weight"] and masks.left_alone["0.weight"] == "not selected"
    assert masks.sparsity == 0.5
    with pytest.raises(UnknownName, match="did you mean '4.weight'"):
        prune_(net(), sparsity=0.5, only="5.weight")
    with pytest.raises(Unsupported, match="nothing of this can be pruned.*a bias"):
        prune_(net(), sparsity=0.5, only="*b*as")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    module = net().to(dtype)
    scores = flat(module)
    masks = prune_(module, sparsity=0.9)
    assert module[0].weight.dtype is dtype
    kept = np.concatenate([mask.numpy().ravel() for mask in masks.values()])
    assert scores[kept].min() >= scores[~kept].max()
    assert masks.sparsity == round(0.9 * len(scores)) / len(scores)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_named_and_nothing_changes(bad: float) -> None:
    module = net()
    with torch.no_grad():
        module[4].weight[0, 0] = bad
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(NonFinite, match="4.weight"):
        prune_(module, sparsity=0.5)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"sparsity": 1.2}, InvalidArgument),
        ({"sparsity": math.nan}, InvalidArgument),
        ({"score": "magnitud"}, UnknownName),
        ({"allocation": "globl"}, UnknownName),
        ({"masks": Masks({"0.weight": torch.ones(2, dtype=torch.bool)})}, InvalidArgument),
    ],
)
def test_bad_arguments_change_nothing(
    change: dict[str, object], error: type[KarikomiError]
) -> None:
    module = net()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error):
        prune_(module, **{"sparsity": 0.5, **change})  # type: ignore[arg-type]
    assert all(torch.equal(one, before[name]) for name, one in module.state_dict().items())


def test_a_module_without_layers_is_refused() -> None:
    with pytest.raises(Unsupported, match="LayerNorm"):
        prune_(nn.LayerNorm(3), sparsity=0.5)


def test_an_emptied_tensor_is_named() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(module[0].weight, 1e-6)
    nn.init.constant_(module[1].weight, 1.0)
    assert prune_(module, sparsity=0.5).emptied == ("0.weight",)


@settings(max_examples=20)
@given(st.lists(st.floats(0, 0.99), min_size=2, max_size=5))
def test_masks_only_ever_grow(levels: list[float]) -> None:
    module, masks = net(), None
    for sparsity in sorted(levels):
        with torch.no_grad():
            for weight in prunable(module)[0].values():
                weight.add_(torch.randn_like(weight))  # what an optimizer may do
        before, masks = masks, prune_(module, sparsity=sparsity, masks=masks)
        total = sum(size for _, size in masks.counts().values())
        assert masks.sparsity == round(sparsity * total) / total
        for name, mask in masks.items():
            assert before is None or not bool((mask & ~before[name]).any())
            assert not bool(module.get_parameter(name)[~mask].any())


def test_a_lower_sparsity_takes_nothing_back() -> None:
    module = net()
    masks = prune_(module, sparsity=0.8)
    again = prune_(module, sparsity=0.3, masks=masks)
    assert all(torch.equal(masks[name], again[name]) for name in masks)


def test_masks_of_other_tensors_are_kept() -> None:
    module = net()
    masks = prune_(module, sparsity=0.5, only="0.weight")
    more = prune_(module, sparsity=0.75, only="4.weight", masks=masks)
    assert set(more) == {"0.weight", "4.weight"}
    assert torch.equal(more["0.weight"], masks["0.weight"])
    assert "4.weight" not in more.left_alone


def test_rounds_by_a_schedule_hold_between() -> None:
    module, masks = net(), Masks()
    rule = Gradual(0.9, steps=(2, 10), every=3)
    seen = []
    for step in range(14):
        with torch.no_grad():
            for weight in module.parameters():
                weight.add_(0.01)
        masks.apply_(module)
        if rule.due(step):
            masks = prune_(module, rule.sparsity_at(step), masks=masks)
        seen.append(round(masks.sparsity, 2))
        assert all(not bool(module.get_parameter(n)[~mask].any()) for n, mask in masks.items())
    expected = [0, 0, 0, 0, 0, 0.68, 0.68, 0.68, 0.89, 0.89, 0.9, 0.9, 0.9, 0.9]
    assert seen == expected


def test_gradients_are_masked() -> None:
    module = net()
    masks = prune_(module, sparsity=0.5)
    module(torch.randn(2, 3, 5, 5)).sum().backward()
    before = module[4].weight.grad.clone()
    masks.mask_gradients_(module)
    kept = masks["4.weight"]
    assert torch.equal(module[4].weight.grad[kept], before[kept])
    assert bool(before[~kept].any()) and not bool(module[4].weight.grad[~kept].any())
    assert module[1].weight.grad is not None


def test_masks_survive_a_checkpoint_that_holds_plain_data_only() -> None:
    masks = prune_(net(), sparsity=0.37)
    stream = io.BytesIO()
    torch.save(masks.state_dict(), stream)
    stream.seek(0)
    again = Masks.from_state_dict(torch.load(stream, weights_only=True))
    assert list(again) == list(masks)
    assert all(torch.equal(again[name], masks[name]) for name in masks)
    assert again.counts() == masks.counts() and again.sparsity == masks.sparsity


@pytest.mark.parametrize(
    "one",
    [
        {},
        {"bits": torch.zeros(2, dtype=torch.uint8), "shape": [3]},
        {"bits": torch.zeros(1), "shape": [3]},
        {"bits": None, "shape": [3]},
        {"bits": torch.zeros(1, dtype=torch.uint8), "shape": "x"},
        3,
    ],
)
def test_damaged_masks_are_named(one: object) -> None:
    with pytest.raises(BadFile, match="fc.weight"):
        Masks.from_state_dict({"fc.weight": one})  # type: ignore[dict-item]


def test_masks_that_do_not_fit() -> None:
    with pytest.raises(UnknownName, match="did you mean '4.weight'"):
        Masks({"5.weight": torch.ones(1, dtype=torch.bool)}).apply_(net())
    with pytest.raises(InvalidArgument, match="0.weight"):
        Masks({"0.weight": torch.ones(1, dtype=torch.bool)}).apply_(net())
    with pytest.raises(InvalidArgument, match="boolean"):
        Masks({"0.weight": torch.ones(1)})


def test_no_mask_is_no_sparsity() -> None:
    assert Masks().sparsity == 0.0 and Masks().emptied == ()
    assert Masks({"w": torch.ones(2, dtype=torch.bool)}).to("cpu")["w"].all()


def test_the_account_says_what_whole_units_made_of_a_sparsity() -> None:
    def account(**arguments: object) -> str:
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        return str(prune_(net, pattern="units", **arguments).account)

    assert "at least 0.3 was asked for; whole units make it 0.5" in account(sparsity=0.3)
    nearest = account(sparsity=0.3, rounding="nearest")
    assert "nearest to 0.3 was asked for; whole units make it 0.25" in nearest
    assert "asked for" not in account(sparsity=0.5) + account(width=0.6)
