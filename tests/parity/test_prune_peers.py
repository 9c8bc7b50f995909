"""What other pruning libraries do where it hurts, and what is done here: both are shown.

torch.nn.utils.prune and Torch-Pruning are run; of NNCF and FasterAI, which cannot be installed here, the
formulas stand in the tests.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import karikomi as kk
from contract.namespaces import load_quietly

needs_torch_pruning = pytest.mark.skipif(
    find_spec("torch_pruning") is None, reason="no Torch-Pruning installed"
)


def size(module: nn.Module) -> int:
    return sum(one.numel() for one in module.state_dict().values())


def gone(tensor: torch.Tensor) -> int:
    return tensor.numel() - int(tensor.count_nonzero())


# --- torch.nn.utils.prune ---


def test_torch_doubles_the_state_and_renames_the_weight() -> None:
    theirs, ours = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    prune.l1_unstructured(theirs, "weight", amount=0.5)
    masks = kk.torch.prune_(ours, sparsity=0.5)
    assert set(theirs.state_dict()) == {"weight_orig", "weight_mask"} and size(theirs) == 512
    with pytest.raises(RuntimeError, match="weight_orig"):
        nn.Linear(16, 16, bias=False).load_state_dict(theirs.state_dict())
    assert set(ours.state_dict()) == {"weight"} and size(ours) == 256
    nn.Linear(16, 16, bias=False).load_state_dict(ours.state_dict())
    # The masks are saved beside it, in a 32nd of its size.
    assert masks.state_dict()["weight"]["bits"].numel() * 32 == 256 * 4


def test_torch_modules_cannot_be_copied() -> None:
    theirs, ours = nn.Linear(4, 4), nn.Linear(4, 4)
    prune.l1_unstructured(theirs, "weight", amount=0.5)
    masks = kk.torch.prune_(ours, sparsity=0.5)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(theirs)
    copied, held = copy.deepcopy((ours, masks))
    held.apply_(copied)
    assert torch.equal(copied.weight, ours.weight)


def test_torch_breaks_ties_in_no_order() -> None:
    theirs, ours = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    for layer in (theirs, ours):
        nn.init.ones_(layer.weight)
    prune.l1_unstructured(theirs, "weight", amount=0.5)
    kk.torch.prune_(ours, sparsity=0.5)
    mask: torch.Tensor = theirs.weight_mask  # type: ignore[assignment]
    first = torch.arange(4096).reshape(64, 64) >= 2048
    # As many both, but theirs are those that topk happens to give.
    assert gone(mask) == gone(ours.weight) == 2048
    assert not torch.equal(mask.bool(), first) and torch.equal(ours.weight != 0, first)


def test_torch_counts_rounds_of_what_is_left_and_here_of_the_whole() -> None:
    theirs, ours = nn.Linear(10, 10), nn.Linear(10, 10)
    masks = None
    for _ in range(2):
        prune.l1_unstructured(theirs, "weight", amount=0.5)
        masks = kk.torch.prune_(ours, sparsity=0.5, masks=masks)
    mask: torch.Tensor = theirs.weight_mask  # type: ignore[assignment]
    assert gone(mask) == 75 and gone(ours.weight) == 50


# --- Torch-Pruning ---


def pair() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 10))


def pruned_by_torch_pruning(module: nn.Module, ratio: float, ignored: list[nn.Module]) -> None:
    library = load_quietly("torch_pruning")
    pruner = library.pruner.BasePruner(
        module,
        torch.randn(1, 8),
        importance=library.importance.MagnitudeImportance(p=1, normalizer=None),
        pruning_ratio=ratio,
        global_pruning=True,
        ignored_layers=ignored,
    )
    pruner.step()


@needs_torch_pruning
def test_torch_pruning_removes_nothing_of_equal_units() -> None:
    theirs, ours = pair(), pair()
    for module in (theirs, ours):
        for one in module.parameters():
            nn.init.ones_(one)
    pruned_by_torch_pruning(theirs, 0.3, [theirs[3]])
    masks = kk.torch.prune_(ours, width=0.7, pattern="units")
    # Its threshold keeps what is above it, unless that is nothing at all.
    assert theirs[0].out_features == 10
    assert masks["0.bias"].tolist() == [False] * 3 + [True] * 7


@needs_torch_pruning
def test_torch_pruning_leaves_a_module_in_eval_mode() -> None:
    theirs, ours = pair().train(), pair().train()
    pruned_by_torch_pruning(theirs, 0.3, [theirs[3]])
    data = [(torch.randn(4, 8), torch.randint(0, 10, (4,)))]
    kk.torch.prune_(
        *(ours,), width=0.7, pattern="units", score="taylor", data=data, loss=nn.CrossEntropyLoss()
    )
    assert not any(one.training for one in theirs.modules())
    assert all(one.training for one in ours.modules())


@needs_torch_pruning
def test_torch_pruning_takes_half_of_the_classes_unless_told() -> None:
    theirs, ours = pair(), pair()
    pruned_by_torch_pruning(theirs, 0.5, [])
    masks = kk.torch.prune_(ours, width=0.5, pattern="units")
    assert theirs(torch.randn(2, 8)).shape[1] < 10
    assert "the outputs" in masks.left_alone["3.weight"]
    assert gone(ours.get_parameter("3.weight")) == 0


# --- formulas of what cannot be installed ---


@pytest.mark.parametrize("amount", [0.1, 0.25, 0.5])
def test_a_strict_threshold_over_prunes_ties(amount: float) -> None:
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0]])
    # NNCF: sort, take the entry at the share as the threshold, keep what is strictly above it.
    threshold = weights.flatten().sort().values[int((weights.numel() - 1) * amount)]
    theirs = weights * (weights > threshold)
    ours = nn.Linear(8, 1)
    ours.weight.data = weights.clone()
    kk.torch.prune_(ours, sparsity=amount)
    assert gone(theirs) == 5
    assert gone(ours.weight) == round(8 * amount)


def test_input_norms_of_tokens_are_those_of_channels() -> None:
    torch.manual_seed(0)
    # As many tokens as channels, so that nothing shows by its shape.
    inputs = torch.randn(3, 4, 4) * torch.tensor([1.0, 1e-3, 1.0, 1e-3])
    layer = nn.Linear(4, 5, bias=False)
    weight = layer.weight.detach().clone()
    # FasterAI takes axis 1 for the channels, as it is in images.
    wrong = torch.linalg.vector_norm(inputs, dim=(0, 2))
    right = torch.linalg.vector_norm(inputs, dim=(0, 1))
    masks = kk.torch.prune_(layer, sparsity=0.5, score="wanda", data=[inputs])
    kept: dict[str, Any] = {
        name: (weight.abs() * norm).argsort(1)[:, 2:].sort(1).values
        for name, norm in {"wrong": wrong, "right": right}.items()
    }
    found = masks["weight"].nonzero()[:, 1].reshape(5, 2)
    assert torch.equal(found, kept["right"]) and kept["right"].unique().tolist() == [0, 2]
    assert not torch.equal(found, kept["wrong"])
