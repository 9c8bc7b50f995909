"""Scores without pruning, and pruning by scores of one's own."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as peer

import karikomi as kk
from karikomi.errors import InvalidArgument, NonFinite, UnknownName, Unsupported
from karikomi.torch import prune_, scores
from prune_networks import batches, mlp, net, parameter, untouched

LOSS = nn.CrossEntropyLoss()


@pytest.mark.parametrize(
    "score", ["magnitude", "l2", "lamp", "random", "wanda", "taylor", "snip", "fisher"]
)
def test_pruning_by_the_scores_equals_pruning_by_the_score(score: str) -> None:
    module, data = net(), batches()
    with untouched(module):
        found = scores(module, score=score, data=data, loss=LOSS)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        name: tuple(parameter(module, name).shape) for name in ("0.weight", "4.weight", "9.weight")
    }
    assert found.left_alone["0.bias"] == "a bias"
    asked: dict[str, Any] = {"allocation": "global"} if score != "wanda" else {}
    expected = prune_(net(), 0.7, score=score, data=batches(), loss=LOSS, **asked)
    if score == "wanda":  # within rows
        return
    masks = prune_(module, 0.7, importance=found, allocation="global")
    assert all(torch.equal(masks[name], expected[name]) for name in expected)


def test_what_magnitude_is() -> None:
    module = net()
    found = scores(module)
    assert torch.equal(found["4.weight"], parameter(module, "4.weight").abs())
    half = scores(module.bfloat16())["4.weight"]
    assert half.dtype == torch.float32
    assert torch.equal(half, parameter(module, "4.weight").float().abs())


@pytest.mark.parametrize("score", ["apoz", "fpgm", "bn_scale", "l2"])
def test_of_units_one_number_each(score: str) -> None:
    pattern = "units" if score == "l2" else None
    found = scores(net(), score=score, pattern=pattern, data=batches(), exclude="9.*")
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "0.weight": (8,),
        "4.weight": (8,),
    }


def test_the_table_has_a_histogram_per_tensor() -> None:
    found = kk.prune.Importances(
        {"a": np.array([0.0, 1.0, 100.0], np.float32), "empty": np.zeros(0, np.float32)},
        score="magnitude",
    )
    row, empty = found.spreads()
    assert row[1:7] == (3, 0.0, 1.0, pytest.approx(101 / 3), 100.0, 1.0)
    assert sum(row.counts) == 3 and row.counts[0] == 2 and row.counts[-1] == 1
    assert empty.items == 0 and not any(empty.counts)
    assert str(found).count("▕") == 2 and "magnitude, 0 to 100" in str(found)
    signed = kk.prune.Importances({"a": np.array([-2.0, 2.0], np.float32)}, score="own")
    assert signed.edges()[0] == -2.0 and signed.edges()[-1] == 2.0
    nothing = kk.prune.Importances({"a": np.zeros(3, np.float32)}, score="own")
    assert sum(nothing.spreads()[0].counts) == 3 and "0.0%" in str(nothing)


def test_importance_is_torchs_importance_scores() -> None:
    torch.manual_seed(0)
    ours, theirs = mlp(5, 6, 3), mlp(5, 6, 3)
    worth = {f"{i}.weight": torch.rand_like(ours[i].weight) for i in (0, 2)}  # type: ignore[arg-type]
    peer.global_unstructured(
        [(theirs[0], "weight"), (theirs[2], "weight")],
        pruning_method=peer.L1Unstructured,
        importance_scores={(theirs[i], "weight"): worth[f"{i}.weight"] for i in (0, 2)},
        amount=0.4,
    )
    masks = prune_(ours, 0.4, importance=worth)
    for i in (0, 2):
        assert torch.equal(masks[f"{i}.weight"], theirs[i].weight_mask.bool())  # type: ignore[union-attr]


def test_what_has_no_importance_is_left_alone_by_name() -> None:
    module = mlp(4, 6, 2)
    masks = prune_(module, 0.5, importance={"0.weight": -torch.arange(24.0).reshape(6, 4)})
    assert masks.left_alone["2.weight"] == "no importance is given for it"
    # The lowest go: here the last ones.
    assert masks["0.weight"].reshape(-1).tolist() == [True] * 12 + [False] * 12


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"importance": {"0.wieght": 1.0}}, UnknownName, "did you mean '0.weight'"),
        ({"importance": {}}, InvalidArgument, "no selected weight has an importance"),
        ({"importance": [1.0]}, InvalidArgument, "not a mapping"),
        ({"importance": {"0.weight": torch.ones(3, 3)}}, InvalidArgument, "does not fit"),
        ({"importance": {"0.weight": torch.full((6, 4), torch.nan)}}, NonFinite, "0.weight"),
        ({"importance": {"0.weight": 1.0}, "score": "snip"}, InvalidArgument, "a score itself"),
        ({"score": "importance"}, InvalidArgument, "importance={name: array}"),
    ],
)
def test_importances_that_mean_nothing(asked: dict[str, Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        prune_(mlp(4, 6, 2), 0.5, **asked)


def test_units_by_an_importance_and_a_norm() -> None:
    worth = torch.tensor([[3.0, 0.0], [2.0, 2.0], [0.0, 2.5]])
    layer = nn.Linear(2, 3)
    pattern = kk.prune.Units(axis=0, norm=2)
    masks = prune_(layer, count=1, pattern=pattern, importance={"weight": worth})
    assert (~masks["weight"]).any(1).tolist() == [False, False, True]
    masks = prune_(layer, count=1, pattern=kk.prune.Units(axis=0), importance={"weight": worth})
    assert (~masks["weight"]).any(1).tolist() == [False, False, True]


def test_scores_that_reconstruct_are_refused_and_earlier_masks_score_zero() -> None:
    module = mlp(4, 6, 2)
    with pytest.raises(Unsupported, match="anew after each removal"):
        scores(module, score="obc", data=[torch.randn(4, 4)])
    masks = prune_(module, 0.5)
    found = scores(module, masks=masks)
    assert bool((found["0.weight"] == 0).equal(~masks["0.weight"]))
    again = pickle.loads(pickle.dumps(found))
    assert str(again) == str(found) and torch.equal(again["2.weight"], found["2.weight"])


def test_empty_arrays_have_no_scores_and_no_histogram() -> None:
    found = kk.numpy.scores({"none": np.ones((0, 3)), "some": np.ones(2)})
    assert found["none"].shape == (0, 3) and found.spreads()[0].items == 0
    assert "none" in str(kk.numpy.scores({"none": np.ones((0, 3))}))


def test_numpy_and_jax_give_the_same_numbers() -> None:
    module = mlp(4, 6, 2)
    arrays = {n: p.detach().numpy() for n, p in module.named_parameters() if p.dim() > 1}
    ours, host = scores(module), kk.numpy.scores(arrays)
    assert all(np.array_equal(ours[name].numpy(), host[name]) for name in arrays)
    jax = pytest.importorskip("jax")
    found = kk.jax.scores({name: jax.numpy.asarray(value) for name, value in arrays.items()})
    assert all(np.array_equal(np.asarray(found[name]), host[name]) for name in arrays)
    pruned, masks = kk.numpy.prune(arrays, count=7, importance=host)
    assert sum(int((~mask).sum()) for mask in masks.values()) == 7 and len(pruned) == 2
    _, theirs = kk.jax.prune(arrays, count=7, importance=found)
    assert all(np.array_equal(np.asarray(theirs[name]), masks[name]) for name in masks)
