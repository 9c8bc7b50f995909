"""What is selected and how much goes: counts, named tensors, slices, pools, padding, the share of all weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as peer

import karikomi as kk
from karikomi.errors import InvalidArgument, Unsupported
from karikomi.torch import prune_
from prune_networks import mlp, net, parameter

CROSS = nn.CrossEntropyLoss()


def twin(*shape: int, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    make = nn.Linear if len(shape) == 2 else nn.Conv2d
    first, second = make(*shape), make(*shape)
    second.load_state_dict(first.state_dict())
    return first, second


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 34), seed=st.integers(0, 99))
def test_a_count_is_torchs_absolute_amount(count: int, seed: int) -> None:
    ours, theirs = twin(5, 7, seed=seed)
    peer.l1_unstructured(theirs, "weight", amount=count)
    masks = prune_(ours, count=count)
    assert masks.counts()["weight"][0] == count
    assert torch.equal(masks["weight"], theirs.weight_mask.bool())  # type: ignore[union-attr]


@settings(max_examples=40, deadline=None)
@given(
    axis=st.integers(-4, 3),
    norm=st.sampled_from([0.5, 1, 2, 3.7, float("inf")]),
    share=st.floats(0.0, 0.99),
    seed=st.integers(0, 99),
)
def test_slices_along_any_axis_and_norm_are_torchs_ln_structured(
    axis: int, norm: float, share: float, seed: int
) -> None:
    ours, theirs = twin(6, 5, 3, seed=seed)
    count = min(round(share * ours.weight.shape[axis]), ours.weight.shape[axis] - 1)
    peer.ln_structured(theirs, "weight", amount=count, n=norm, dim=axis)
    masks = prune_(ours, count=count, pattern=kk.prune.Units(axis=axis, norm=norm))
    assert torch.equal(masks["weight"], theirs.weight_mask.bool())  # type: ignore[union-attr]
    assert masks.left_alone["bias"] == "a bias"


def test_a_norm_takes_the_scores_of_weights_and_units_still_take_their_bias() -> None:
    module, loss = mlp(4, 6, 2), CROSS
    data = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
    scores = kk.torch.scores(module, score="taylor", data=data, loss=loss)["0.weight"]
    masks = prune_(
        module,
        count=2,
        score="taylor",
        data=data,
        loss=loss,
        pattern=kk.prune.Units(norm=2),
    )
    worst = scores.double().norm(dim=1).argsort()[:2]
    assert set((~masks["0.bias"]).nonzero().reshape(-1).tolist()) == set(worst.tolist())
    with pytest.raises(Unsupported, match="norm takes scores of single weights"):
        prune_(module, width=0.5, score="fpgm", pattern=kk.prune.Units(norm=2))
    with pytest.raises(Unsupported, match="not of slices along another axis"):
        prune_(module, count=1, score="apoz", data=data, pattern=kk.prune.Units(axis=1))


def test_norms_survive_what_powers_do_not() -> None:
    layer = nn.Linear(2, 3, dtype=torch.float32)
    layer.weight.data = torch.tensor([[1e30, 1e30], [2e30, 0.0], [1e-30, 0.0]])
    masks = prune_(layer, count=1, pattern=kk.prune.Units(axis=0, norm=20))
    assert (~masks["weight"]).any(1).tolist() == [False, False, True]
    layer.weight.data.zero_()
    assert prune_(layer, count=1, pattern=kk.prune.Units(axis=0, norm=2)).sparsity == 1 / 3


def test_counts_by_hand_are_per_tensor_and_may_empty_one() -> None:
    module = mlp(4, 6, 2)
    masks = prune_(module, count={"0.*": 3, "2.weight": 12})
    assert masks.counts() == {"0.weight": (3, 24), "2.weight": (12, 12)}
    assert masks.emptied == ("2.weight",)
    later = prune_(module, count={"0.weight": 5}, masks=masks)
    assert later.counts()["0.weight"] == (5, 24) and later.counts()["2.weight"] == (12, 12)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"count": 36}, "at least one item"),
        ({"count": 2.0}, "whole number"),
        ({"count": True}, "whole number"),
        ({"count": -1}, "whole number >= 0"),
        ({"count": {"0.weight": 25}}, "more are to go than there are"),
        ({"count": {"0.weight": 0.5}}, "whole number"),
        ({"count": {}}, "no count"),
        ({"count": 3, "sparsity": 0.5}, "one target"),
        ({"count": {"0.weight": 3}, "sparsity": 0.5}, "both"),
        ({"count": 3, "pattern": "2:4"}, "no target"),
        ({"pattern": kk.prune.Units(axis=3), "count": 1}, "go together as units"),
    ],
)
def test_counts_that_mean_nothing(asked: dict[str, Any], says: str) -> None:
    module = mlp(4, 6, 2)
    before = parameter(module, "0.weight").clone()
    with pytest.raises((InvalidArgument, Unsupported), match=says):
        prune_(module, **asked)
    assert torch.equal(before, parameter(module, "0.weight"))


class Scan(nn.Module):
    """A parameter of a layer that is not known, tied to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(-1.0, 1.0, 8))
        self.norm = nn.LayerNorm(8)
        nn.init.normal_(self.norm.bias)
        self.mix = nn.Linear(8, 8)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.mix(self.norm(inputs * self.decay))


@pytest.mark.parametrize(
    ("only", "masked"),
    [
        ("*.bias", {"norm.bias", "mix.bias"}),
        ("mix.bias", {"mix.bias"}),
        ("mix.*", {"mix.weight"}),
        ("*", {"mix.weight"}),
        ("*.weight", {"mix.weight"}),
        ("norm.weight", {"norm.weight"}),
        (["decay", "mix.weight"], {"decay", "mix.weight"}),
        ("*decay", {"decay"}),
    ],
)
def test_what_is_spelled_out_is_pruned(only: Any, masked: set[str]) -> None:
    assert set(prune_(Scan(), 0.5, only=only)) == masked


def test_a_named_bias_by_its_gradient_and_in_training() -> None:
    torch.manual_seed(0)
    module = Scan()
    data = [(torch.randn(8, 8), torch.randint(0, 8, (8,)))]
    masks = prune_(module, 0.5, only="*.bias", score="taylor", data=data, loss=CROSS)
    assert masks.counts() == {"norm.bias": (masks.counts()["norm.bias"][0], 8)} | {
        "mix.bias": (8 - masks.counts()["norm.bias"][0], 8)
    }
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    handle = kk.torch.attach(
        optimizer, module, prune=kk.prune.OneShot(0.25, only=["decay", "mix.bias"])
    )
    CROSS(module(data[0][0]), data[0][1]).backward()
    optimizer.step()
    assert handle.masks is not None and set(handle.masks) == {"decay", "mix.bias"}


def test_the_account_states_the_share_of_all_weights_first() -> None:
    module = net()
    account = prune_(module, 0.5).account
    total = sum(item.numel() for item in module.parameters())
    assert account.total == total and account.as_dict()["sparsity_of_all"] < account.sparsity == 0.5
    zero = sum(row.removed for row in account.rows)
    assert str(account).splitlines()[0].startswith(f"{zero} of all {total} weights are zero (")
    assert account.sparsity_of_all == zero / total


# --- recurrent and attention weights ---


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_weights_by_their_inputs(kind: Any) -> None:
    torch.manual_seed(0)
    module = kind(3, 4, num_layers=2, batch_first=True)
    data = [torch.randn(5, 6, 3)]
    norms = {}
    with torch.no_grad():
        outputs, _ = module(data[0])
        norms["weight_ih_l0"] = data[0].reshape(-1, 3).norm(dim=0)
        before = torch.cat([torch.zeros(5, 1, 4), outputs[:, :-1]], dim=1)
        norms["weight_hh_l1"] = before.reshape(-1, 4).norm(dim=0)
    scores = kk.torch.scores(module, score="wanda", data=data)
    for name, norm in norms.items():
        expected = parameter(module, name).abs() * norm
        torch.testing.assert_close(scores[name], expected, rtol=1e-4, atol=1e-6)
    assert prune_(module, 0.5, score="wanda", data=data).sparsity == 0.5


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_what_a_projection_of_states_reads_is_not_seen() -> None:
    module, data = nn.LSTM(3, 4, proj_size=2, batch_first=True), [torch.randn(2, 5, 3)]
    masks = prune_(module, 0.5, score="wanda", data=data)
    assert "stays inside" in masks.left_alone["weight_hr_l0"]
    assert "weight_hr_l0" in prune_(module, 0.5)


def test_attention_by_inputs_and_heads_and_units_as_before() -> None:
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    data = [torch.randn(4, 5, 8)]
    masks = prune_(module, 0.5, score="wanda", data=data)
    assert "self_attn.in_proj_weight" in masks and masks.sparsity == 0.5
    units = prune_(module, width=0.5, pattern="units")
    assert "rows are queries" in units.left_alone["self_attn.in_proj_weight"]
    heads = prune_(module, width=0.5, pattern="heads", protect=("attention",))
    assert "self_attn.in_proj_weight" in heads


def test_scores_that_reconstruct_leave_stacked_weights_alone() -> None:
    module, data = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [torch.randn(4, 5, 8)]
    masks = prune_(module, 0.5, score="sparsegpt", data=data)
    assert "queries" in masks.left_alone["self_attn.in_proj_weight"]


def test_a_budget_of_macs_counts_recurrent_layers() -> None:
    module = nn.Sequential(nn.LSTM(3, 4, batch_first=True))
    masks = prune_(module, macs=0.5, data=[torch.randn(2, 6, 3)])
    kept = {n: int(mask.sum()) for n, mask in masks.items()}
    assert sum(kept.values()) * 6 <= 0.5 * 6 * 16 * 7 < (sum(kept.values()) + 1) * 6


# --- blocks and n of m ---


def test_pooled_blocks_are_the_means_and_maxima_of_what_is_there() -> None:
    weights = np.random.default_rng(0).normal(size=(5, 7))
    rows = {"w": kk.prune.Layout(units=0, inputs=1)}
    for pool, of in (("mean", np.mean), ("max", np.max)):
        pooled = np.array(
            [[of(np.abs(weights[i : i + 2, j : j + 3])) for j in (0, 3, 6)] for i in (0, 2, 4)]
        )
        pattern = kk.prune.Blocks(2, 3, pool=pool)
        found = kk.numpy.scores({"w": weights}, pattern=pattern, layouts=rows)["w"]
        np.testing.assert_allclose(found, pooled.reshape(-1), rtol=1e-6)
        _, masks = kk.numpy.prune({"w": weights}, count=4, pattern=pattern, layouts=rows)
        stays = np.ones(9, bool)
        stays[np.argsort(pooled.reshape(-1))[:4]] = False
        expected = stays.reshape(3, 3).repeat(2, 0).repeat(3, 1)[:5, :7]
        assert (masks["w"] == expected).all()
    with pytest.raises(InvalidArgument, match=r"Blocks.pool.*sum, mean, max"):
        kk.prune.Blocks(2, 2, pool="avg")


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 11), keep=st.integers(1, 3), of=st.integers(2, 5), seed=st.integers(0, 9)
)
def test_n_of_m_is_padded_if_asked(width: int, keep: int, of: int, seed: int) -> None:
    keep = min(keep, of - 1)
    weights = np.random.default_rng(seed).normal(size=(3, width))
    rows = {"w": kk.prune.Layout(units=0, inputs=1)}
    _, masks = kk.numpy.prune(
        {"w": weights}, pattern=kk.prune.NofM(keep=keep, of=of, pad=True), layouts=rows
    )
    # As the TensorFlow Model Optimization Toolkit has it: magnitudes filled with zeros, the best of each group kept.
    missing = -width % of
    groups = np.pad(np.abs(weights), ((0, 0), (0, missing))).reshape(-1, of)
    best = np.argsort(-groups, axis=1, kind="stable")[:, :keep]
    stays = np.zeros(groups.shape, bool)
    np.put_along_axis(stays, best, True, axis=1)
    assert (masks["w"] == stays.reshape(3, -1)[:, :width]).all()


def test_without_padding_a_width_that_is_not_divisible_is_left_alone() -> None:
    module = mlp(8, 6, 4)
    masks = prune_(module, pattern="2:4")
    assert "does not divide" in masks.left_alone["2.weight"]
    padded = prune_(module, pattern=kk.prune.NofM(keep=2, of=4, pad=True))
    assert padded["2.weight"].sum(1).tolist() == [4] * 4
