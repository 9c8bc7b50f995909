"""What goes wrong without a word in what is selected, each trap shown not to: scores, layers, budgets, arguments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import karikomi as kk
import karikomi.selection.exact_masks as selecting
from karikomi.errors import InvalidArgument, KarikomiError, NonFinite, UnknownName, Unsupported
from karikomi.prune import Blocks, Layout, NofM
from karikomi.torch.pruning.masks import Masks
from prune_networks import batches, linear, mlp, net, parameter, untouched

prune_: Callable[..., Masks] = kk.torch.prune_
loss = F.cross_entropy
ALLOCATIONS = ("uniform", "erk", "lamp", "owl", "isomorphic")


# --- scores that are equal, zero, or no numbers ---


@pytest.mark.parametrize("allocation", ["global", *ALLOCATIONS])
def test_where_all_weights_are_zero_exactly_as_many_go(allocation: str) -> None:
    module = mlp(8, 16, 4)
    with torch.no_grad():
        for one in module.parameters():
            one.zero_()
    data = [torch.randn(3, 8)]
    masks = prune_(module, sparsity=0.5, allocation=allocation, data=data)
    assert sum(gone for gone, _ in masks.counts().values()) == 96


@pytest.mark.parametrize("score", ["magnitude", "l2", "lamp", "snip", "taylor", "fisher"])
def test_a_layer_of_zeros_goes_first_and_no_score_is_nan(score: str) -> None:
    module = mlp(8, 16, 4)
    nn.init.zeros_(module.get_parameter("0.weight"))
    data = [(torch.randn(5, 8), torch.randint(0, 4, (5,)))]
    masks = prune_(module, sparsity=0.5, score=score, data=data, loss=loss)
    assert masks.counts() == {"0.weight": (96, 128), "2.weight": (0, 64)}


def test_equal_units_go_in_order() -> None:
    module = nn.Sequential(linear([[1.0, -1.0]] * 6), nn.Linear(6, 2))
    masks = prune_(module, width=0.5, pattern="units")
    assert masks["0.bias"].tolist() == [False] * 3 + [True] * 3
    assert prune_(linear([[2.0] * 8]), pattern=NofM(keep=2, of=4))["weight"].tolist() == [
        [False, False, True, True] * 2
    ]


@pytest.mark.parametrize("pattern", ["unstructured", "units", NofM(keep=1, of=2), Blocks(1, 2)])
def test_minus_zero_is_zero_and_what_goes_is_plus_zero(pattern: Any) -> None:
    rows = [[-0.0, -1e-40], [0.0, -0.0], [-3.0, 2.0], [-1e-45, -5.0]]
    module = nn.Sequential(linear(rows), linear([[9.0, 9.0, 9.0, 9.0]]))
    target = {} if isinstance(pattern, NofM) else {"sparsity": 0.4}
    masks = prune_(module, pattern=pattern, protect=("last",), **target)
    gone = parameter(module, "0.weight")[~masks["0.weight"]]
    assert gone.numel() and not gone.any() and not torch.signbit(gone).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("pattern", ["unstructured", "units", NofM(keep=2, of=4), Blocks(2, 2)])
def test_a_score_that_is_no_number_is_named_and_nothing_is_changed(
    bad: float, pattern: Any
) -> None:
    module = mlp(8, 16, 8, 4)
    parameter(module, "2.weight")[3, 5] = bad
    target = {} if isinstance(pattern, NofM) else {"sparsity": 0.4}
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(NonFinite, match=r"2\.weight"):
        prune_(module, pattern=pattern, **target)
    after = module.state_dict()
    assert all(torch.equal(after[n].nan_to_num(), one.nan_to_num()) for n, one in before.items())


# --- layers that are emptied, and what is protected ---


def test_a_layer_that_lost_all_is_named_and_only_a_global_threshold_takes_all() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parameter(module, "1.weight").mul_(1e-3)
    masks = prune_(copy.deepcopy(module), sparsity=0.6)
    assert masks.emptied == ("1.weight",)
    data = [torch.randn(3, 8)]
    # What is isomorphic competes; the others speak of each tensor.
    for allocation in ("uniform", "erk", "lamp", "owl"):
        masks = prune_(copy.deepcopy(module), sparsity=0.98, allocation=allocation, data=data)
        assert masks.emptied == () and max(gone for gone, _ in masks.counts().values()) == 63
        with pytest.raises(InvalidArgument, match="keeps at least one"):
            prune_(copy.deepcopy(module), sparsity=0.999, allocation=allocation, data=data)


class Tied(nn.Module):
    """An embedding whose weight is the head's, recurrent cells, and layers between."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.cells = nn.LSTM(8, 8, batch_first=True)
        self.mix = nn.Linear(8, 8)
        self.again = self.mix
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mixed, _ = self.cells(self.words(ids))
        return self.head(self.again(self.mix(mixed)).relu())


@pytest.mark.parametrize("pattern", ["unstructured", "units", "layers"])
def test_tied_and_recurrent_weights_and_the_outputs_stay(pattern: str) -> None:
    module = Tied()
    # The head is last, though it is tied: what comes before it has no outputs to protect.
    target = {"sparsity": 0.5} if pattern == "unstructured" else {"width": 0.5}
    masks = prune_(module, pattern=pattern, **target)
    single = pattern == "unstructured"
    assert {name.partition(".")[0] for name in masks} == ({"cells", "mix"} if single else {"mix"})
    assert "words.weight" in masks.left_alone
    assert ("cells.weight_hh_l0" in masks.left_alone) != single
    assert parameter(module, "head.weight").all()


@pytest.mark.parametrize("pattern", ["units", "layers"])
def test_the_classifier_keeps_its_outputs_unless_asked(pattern: str) -> None:
    masks = prune_(net(), width=0.5, pattern=pattern)
    assert masks.left_alone["9.weight"] == "the last layer: its units are the outputs"
    assert "9.weight" in prune_(net(), width=0.5, pattern=pattern, protect=())


def test_a_shared_weight_counts_once_in_budgets() -> None:
    data = [torch.zeros(2, 3, dtype=torch.long)]
    module = Tied()
    every = sum(one.numel() for one in module.parameters())
    masks = prune_(module, parameters=every - 40, only="mix*")
    assert masks.counts() == {"mix.weight": (40, 64)}
    # Of an example, three positions pass the cells and the shared layer twice, and then the head.
    whole = 3 * (2 * 256 + 2 * 64 + 88)
    masks = prune_(Tied(), macs=0.9, data=data, only="mix*")
    assert masks.counts()["mix.weight"][0] == int(np.ceil(0.1 * whole / 6))


# --- one pruning after another, budgets ---


@pytest.mark.parametrize("score", ["magnitude", "wanda", "taylor", "obc"])
def test_what_units_took_counts_for_single_weights(score: str) -> None:
    module, data = net(), batches()
    units = prune_(module, width=0.5, pattern="units")
    masks = prune_(module, sparsity=0.8, score=score, data=data, loss=loss, masks=units)
    weights = {name: one for name, one in masks.counts().items() if name.endswith("weight")}
    of, gone = sum(one for _, one in weights.values()), sum(one for one, _ in weights.values())
    assert gone == round(0.8 * of)
    assert all((masks[name] <= one).all() for name, one in units.items())


def test_what_single_weights_took_counts_for_units() -> None:
    module = nn.Sequential(
        linear([[0.3, 0.4], [9.0, 7.0], [5.0, 5.0], [0.1, 0.2]]), nn.Linear(4, 1)
    )
    first = prune_(module, sparsity={"0.weight": 0.5})
    assert first["0.weight"].any(1).tolist() == [False, True, True, False]
    # Two units have nothing left: half of the units are gone already, and take their biases along.
    masks = prune_(module, width=0.5, pattern="units", masks=first)
    dead = ~first["0.weight"].any(1)
    assert torch.equal(~masks["0.bias"], dead) and torch.equal(masks["0.weight"], first["0.weight"])


@settings(max_examples=15)
@given(st.sampled_from(["parameters", "macs", "bytes"]), st.floats(0.5, 0.99), st.booleans())
def test_budgets_are_met_and_by_no_more_than_an_item(unit: str, share: float, units: bool) -> None:
    module, data = net(), [one for one, _ in batches(1)]
    of_weight = {"0.weight": 36.0, "4.weight": 36.0, "9.weight": 1.0}
    pattern = "units" if units else "unstructured"
    allocation = "global"
    masks = prune_(module, pattern=pattern, data=data, allocation=allocation, **{unit: share})
    every = sum(one.numel() for one in module.parameters())
    price = of_weight if unit == "macs" else {n: 4.0 if unit == "bytes" else 1.0 for n in masks}
    total = 36 * (216 + 288) + 320 if unit == "macs" else every * (4 if unit == "bytes" else 1)
    left = total - sum(price.get(n, 0.0) * gone for n, (gone, _) in masks.counts().items())
    left += sum(mask.numel() for mask in masks.values()) / 8 if unit == "bytes" else 0
    item = max(price.values()) * (9 * 4 + 3 if units else 1)
    assert left <= share * total
    assert left > share * total - item or not masks.sparsity


@pytest.mark.parametrize("width", [0.01, 0.1, 1.0])
def test_a_width_leaves_each_layer_a_unit(width: float) -> None:
    module = mlp(4, 3, 50, 2)
    kept = (
        {
            name: size - gone
            for name, (gone, size) in prune_(module, width=width, pattern="units").counts().items()
            if name.endswith("bias")
        }
        if width * 53 >= 2
        else {}
    )
    if not kept:
        with pytest.raises(InvalidArgument, match="keeps at least one"):
            prune_(module, width=width, pattern="units")
    else:
        assert min(kept.values()) >= 1 and sum(kept.values()) == 53 - round((1 - width) * 53)


# --- arguments ---


@pytest.mark.parametrize(
    ("how", "error"),
    [
        (
            {"score": "obc", "pattern": Blocks(2, 2), "sparsity": 0.5, "data": [torch.ones(2, 8)]},
            Unsupported,
        ),
        ({"sparsity": 0.5, "facts": {"gradiant": {}}}, UnknownName),
        ({"sparsity": 0.5, "facts": {"gradient": {"9.weight": 1.0}}}, UnknownName),
        ({"sparsity": 0.5, "masks": {"0.weight": np.ones((8, 8), bool)}}, InvalidArgument),
        ({"sparsity": 0.5, "masks": 3}, InvalidArgument),
        ({"parameters": 3}, Unsupported),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(how: Any, error: type[KarikomiError]) -> None:
    with untouched(module := mlp(8, 8, 4)), pytest.raises(error) as caught:
        prune_(module, **how)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", [None, [nn.Linear(2, 2).weight], nn.Linear(2, 2).state_dict()])
def test_what_is_no_module_is_refused(module: Any) -> None:
    with pytest.raises(InvalidArgument, match="not a module"):
        prune_(module, sparsity=0.5)


def test_blocks_of_what_has_no_inputs() -> None:
    masks = prune_(net(), sparsity=0.5, pattern=Blocks(2, 2), protect=())
    assert masks.left_alone["1.weight"] == "it has no axis of inputs"
    arrays, layouts = {"scale": np.ones(8)}, {"scale": Layout(units=0)}
    with pytest.raises(InvalidArgument, match="axis of inputs"):
        kk.numpy.prune(arrays, sparsity=0.5, pattern=Blocks(2, 2), layouts=layouts)


def test_layers_go_by_budgets_and_heads_not_by_names_of_weights() -> None:
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    for how in ({"parameters": 0.6}, {"sparsity": 0.4}):
        masks = prune_(copy.deepcopy(module), pattern="layers", protect=(), **how)
        assert len(masks.emptied) == 4
    with pytest.raises(Unsupported, match="names of its own"):
        prune_(nn.MultiheadAttention(8, 4), sparsity={"out_proj.weight": 0.5}, pattern="heads")


def test_a_budget_takes_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    at = selecting._Attempt.at
    monkeypatch.setattr(
        selecting._Attempt, "at", lambda self, share: looks.append(share) or at(self, share)
    )
    masks = prune_(mlp(64, 64, 64), parameters=0.3)
    every = 2 * (64 * 64 + 64)
    assert every - round(masks.sparsity * 2 * 64 * 64) == int(0.3 * every) and len(looks) <= 6
