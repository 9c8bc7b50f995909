"""A fresh module takes the shapes of a shrunk one, or says which tensor does not fit."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from karikomi.errors import Unsupported
from karikomi.torch.modules.resizing import resize_
from karikomi.torch.pruning.in_place import prune_
from karikomi.torch.shrinking.smaller_copy import shrink

IMAGES = torch.ones(2, 1, 6, 6)


def net() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            c1=nn.Conv2d(1, 6, 3),
            n1=nn.BatchNorm2d(6),
            c2=nn.Conv2d(6, 8, 3),
            flat=nn.Flatten(),
            f1=nn.Linear(32, 12),
            act=nn.ReLU(),
            f2=nn.Linear(12, 5),
        )
    )


def shrunk() -> tuple[nn.Sequential, nn.Module]:
    torch.manual_seed(0)
    whole = net()
    prune_(whole, sparsity=0.95)
    return whole, shrink(whole, IMAGES)[0]


def test_the_state_of_a_small_network_fits_a_resized_original() -> None:
    whole, small = shrunk()
    fresh = net()
    shapes = {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
    changed = resize_(fresh, shapes)
    assert changed["f1.weight"] == (tuple(whole.f1.weight.shape), tuple(small.f1.weight.shape))
    assert "f2.bias" not in changed
    fresh.load_state_dict(copy.deepcopy(small).state_dict())
    assert torch.equal(fresh.eval()(IMAGES), small.eval()(IMAGES))
    assert str(fresh) == str(small)


def test_only_what_differs_need_be_named() -> None:
    whole, small = shrunk()
    differing = {
        name: tensor.shape
        for name, tensor in small.state_dict().items()
        if tensor.shape != whole.state_dict()[name].shape
    }
    assert set(resize_(whole, differing)) == set(differing)
    whole.load_state_dict(small.state_dict())


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({"f1.weight": (7, 32)}, "f1.bias: the shape does not fit.*got .12,.; allowed: .7,."),
        ({"f1.weight": (7, 32), "f1.bias": (8,)}, "f1.bias: the shape does not fit"),
        ({"f1.weight": (13, 32), "f1.bias": (13,)}, "f1.weight: a resized layer must be smaller"),
        ({"f1.weight": (0, 32), "f1.bias": (0,)}, "f1.weight: a resized layer must be smaller"),
        ({"f1.weight": (32,)}, "f1.weight: the shape does not fit"),
        ({"c1.weight": (6, 1, 1, 1)}, "c1.weight: the shape does not fit"),
        ({"n1.weight": (3,)}, "n1.bias: the shape does not fit"),
        ({"n1.num_batches_tracked": (1,)}, "n1.num_batches_tracked: the shape does not fit"),
        ({"f3.weight": (1, 1)}, "no such tensor; got 'f3.weight'; did you mean"),
    ],
)
def test_shapes_that_do_not_fit_change_nothing(shapes: dict[str, tuple], says: str) -> None:
    whole = net()
    before = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    with pytest.raises((Unsupported, LookupError), match=says):
        resize_(whole, {"c2.weight": (5, 6, 3, 3), "c2.bias": (5,), **shapes})
    assert {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()} == before


def test_layers_that_cannot_be_resized() -> None:
    with pytest.raises(Unsupported, match="weight: a LayerNorm layer cannot be resized"):
        resize_(nn.LayerNorm(4), {"weight": (3,), "bias": (3,)})
    with pytest.raises(Unsupported, match="weight: a Conv1d layer cannot be resized"):
        resize_(nn.Conv1d(4, 4, 1, groups=2), {"weight": (2, 2, 1), "bias": (2,)})
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(Unsupported, match="0.weight: the tensor is shared"):
        resize_(
            tied,
            {name: (2, 4) for name in ("0.weight", "1.weight")}
            | {name: (2,) for name in ("0.bias", "1.bias")},
        )
    masked = nn.Linear(4, 4)
    prune.l1_unstructured(masked, "weight", 0.5)
    with pytest.raises(Unsupported, match="a Linear layer cannot be resized"):
        resize_(masked, {"weight_orig": (2, 4), "weight_mask": (2, 4), "bias": (2,)})


def test_a_resized_parameter_stays_a_parameter() -> None:
    layer = nn.Linear(4, 4, dtype=torch.float64)
    layer.bias.requires_grad_(False)
    resize_(layer, {"weight": [2, 3], "bias": [2]})
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.weight.requires_grad and not layer.bias.requires_grad
    assert layer.weight.dtype is torch.float64
    assert layer(torch.zeros(1, 3, dtype=torch.float64)).shape == (1, 2)
