"""A fresh module takes the shapes of a shrunk one, or says which tensor does not fit."""

from __future__ import annotations

import base64
import copy
import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import karikomi as kk
from karikomi.errors import BadFile, InvalidArgument, Unsupported
from karikomi.shrink.cuts import Cut, Cuts
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
    with pytest.raises(Unsupported, match="weight: a Conv1d layer cannot be resized"):
        resize_(nn.Conv1d(4, 4, 1, groups=2), {"weight": (2, 2, 1), "bias": (2,)})
    masked = nn.Linear(4, 4)
    prune.l1_unstructured(masked, "weight", 0.5)
    with pytest.raises(Unsupported, match="a Linear layer cannot be resized"):
        resize_(masked, {"weight_orig": (2, 4), "weight_mask": (2, 4), "bias": (2,)})


def test_a_shared_tensor_gets_one_shape_and_stays_shared() -> None:
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    shapes = {"0.weight": (2, 4), "0.bias": (2,), "1.bias": (2,)}
    with pytest.raises(Unsupported, match="1.weight: the tensor is shared"):
        resize_(tied, {name: shape for name, shape in shapes.items() if name != "1.bias"})
    with pytest.raises(
        Unsupported, match=r"1.weight: the tensor is shared.*got .3, 4.; allowed: .2, 4."
    ):
        resize_(tied, {**shapes, "1.weight": (3, 4), "1.bias": (3,)})
    resize_(tied, {**shapes, "1.weight": (2, 4)})
    assert tied[1].weight is tied[0].weight and tied[0].weight.shape == (2, 4)
    assert tied[1].out_features == 2


@pytest.mark.parametrize(
    ("layer", "shapes", "attributes"),
    [
        (nn.LayerNorm(4), {"weight": (3,), "bias": (3,)}, {"normalized_shape": (3,)}),
        (nn.GroupNorm(2, 4), {"weight": (2,), "bias": (2,)}, {"num_channels": 2}),
        (nn.Embedding(9, 4), {"weight": (9, 3)}, {"embedding_dim": 3, "num_embeddings": 9}),
        (
            nn.ConvTranspose2d(4, 6, 3),
            {"weight": (2, 5, 3, 3), "bias": (5,)},
            {"in_channels": 2, "out_channels": 5},
        ),
        (
            nn.GRU(4, 5),
            {
                **{"weight_ih_l0": (9, 4), "weight_hh_l0": (9, 3)},
                **{"bias_ih_l0": (9,), "bias_hh_l0": (9,)},
            },
            {"hidden_size": 3, "input_size": 4},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_state_their_new_sizes(
    layer: nn.Module, shapes: dict[str, tuple], attributes: dict[str, object]
) -> None:
    resize_(layer, shapes)
    assert {name: getattr(layer, name) for name in attributes} == attributes
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == shapes


def test_a_resized_parameter_stays_a_parameter() -> None:
    layer = nn.Linear(4, 4, dtype=torch.float64)
    layer.bias.requires_grad_(False)
    resize_(layer, {"weight": [2, 3], "bias": [2]})
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.weight.requires_grad and not layer.bias.requires_grad
    assert layer.weight.dtype is torch.float64
    assert layer(torch.zeros(1, 3, dtype=torch.float64)).shape == (1, 2)


class Heads(nn.Module):
    """Attention whose forward has sizes of its own, a buffer that no file has, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.width = nn.Embedding(11, 8), 6
        self.qkv, self.norm = nn.Linear(8, 36), nn.LayerNorm(12)
        self.up, self.down = nn.Conv1d(12, 12, 1, groups=3), nn.LSTM(12, 8, batch_first=True)
        self.register_buffer("gain", torch.rand(12) + 0.5, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.table(x)).split(2 * self.width, -1)
        q, k, v = (part.unflatten(-1, (2, self.width)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, scale=0.4)
        mixed = self.norm(mixed.transpose(1, 2).flatten(2) * self.gain)
        grouped = self.up(mixed.transpose(1, 2)).transpose(1, 2)
        return F.linear(self.down(grouped)[0], self.table.weight)


TOKENS = torch.arange(10).reshape(2, 5)


def heads(seed: int) -> Heads:
    torch.manual_seed(seed)
    net = Heads().eval()
    net.gain.copy_(torch.linspace(0.5, 1.5, 12))
    return net


def test_a_file_makes_a_fresh_instance_as_small(tmp_path: Path) -> None:
    small, report = shrink(heads(0), TOKENS, width=0.5)
    assert report.form == "module" and small.width == 3 and len(small.gain) == 6
    path = kk.save(small, tmp_path / "small.karikomi")
    fresh = kk.load(path, into=heads(1))
    assert torch.equal(fresh(TOKENS), small(TOKENS)) and str(fresh) == str(small)
    assert kk.save(fresh, tmp_path / "again.karikomi").read_bytes() == path.read_bytes()
    assert torch.equal(kk.load(path, into=fresh)(TOKENS), small(TOKENS))


def test_two_shrinks_are_one_for_a_fresh_instance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = net()
    first, _ = shrink(whole, IMAGES, width=0.5)
    both, report = shrink(nn.Sequential(first), IMAGES, width=0.5)
    assert len(report.kept["0.f1.weight"][0]) == 3
    cuts = Cuts.from_text(kk.torch.notes_of(both)["shrunk"], where="note")
    rows, columns = (torch.tensor(cuts.indices()["0.f1.weight"][axis]) for axis in (0, 1))
    assert torch.equal(whole.f1.weight[rows][:, columns], both[0].f1.weight)
    path = kk.save(both, tmp_path / "both.karikomi")
    fresh = kk.load(path, into=nn.Sequential(net())).eval()
    assert fresh[0].f1.out_features == 3 and torch.equal(fresh(IMAGES), both.eval()(IMAGES))


def test_the_report_has_the_kept_indices_of_every_tensor() -> None:
    net = heads(0)
    small, report = shrink(net, TOKENS, width=0.5)
    before, after = net.state_dict(), small.state_dict()
    assert {"table.weight", "gain", "qkv.bias"} <= set(report.kept)
    for name, tensor in before.items():
        for axis, indices in report.kept.get(name, {}).items():
            tensor = tensor.index_select(axis, torch.tensor(indices))
        assert torch.equal(tensor, after[name]), name
    json.dumps(report.as_dict())


def test_a_network_of_another_size_is_not_filled(tmp_path: Path) -> None:
    path = kk.save(shrink(net(), IMAGES, width=0.5)[0], tmp_path / "small.karikomi")
    wider = net()
    wider.f1, wider.f2 = nn.Linear(32, 14), nn.Linear(14, 5)
    before = {name: tuple(tensor.shape) for name, tensor in wider.state_dict().items()}
    with pytest.raises(Unsupported, match="f1.weight: the kept indices in the file do not fit"):
        kk.load(path, into=wider)
    assert {name: tuple(tensor.shape) for name, tensor in wider.state_dict().items()} == before


class Literal(nn.Sequential):
    """Its forward has a width as a number."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 8), nn.Linear(8, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](self[0](x).view(-1, 2, 4).flatten(1))


def test_an_exported_graph_is_saved_and_loaded_but_not_into_its_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = Literal()
    inputs = torch.randn(2, 3)
    small, report = shrink(whole, inputs, width=0.5)
    assert report.form == "graph" and report.kept["0.bias"][0] == report.kept["1.weight"][1]
    path = kk.save(small, tmp_path / "small.karikomi")
    other = copy.deepcopy(small)
    other.get_parameter("0.weight").data.zero_()
    assert torch.equal(kk.load(path, into=other)(inputs), small(inputs))
    with pytest.raises(Unsupported, match="Literal: the shrunk network is an exported graph"):
        kk.load(path, into=copy.deepcopy(whole))


def changed_note(whole: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**whole, **changes})


FULL = base64.b85encode(bytes([0b11110000])).decode()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cuts": [[4, "@@"]]}, "malformed"),
        ({"cuts": [[3, FULL]]}, "outside of its axis"),
        ({"cuts": [[2**40, FULL]]}, "another number of bits"),
        ({"cuts": [[-4, FULL]]}, "not a natural number"),
        ({"cuts": [[4, base64.b85encode(b"\0").decode()]]}, "at least one"),
        ({"cuts": [[4.0, FULL]]}, "not a natural number"),
        ({"cuts": []}, "malformed"),
        ({"tensors": {"0.weight": {"0": -1}}}, "not a natural number"),
        ({"tensors": {"0.weight": {"-1": 0}}}, "not a natural number"),
        ({"tensors": [1]}, "malformed"),
        ({"attributes": {"0": {"out_features": 1.5}}}, "no whole number"),
        ({"attributes": {"0": {"out_features": True}}}, "no whole number"),
        ({"form": "code"}, "unknown form"),
    ],
)
def test_a_malformed_account_in_a_file_is_refused(changes: dict[str, Any], says: str) -> None:
    whole = {"form": "module", "cuts": [[8, FULL]], "tensors": {"0.weight": {"0": 0}}}
    whole |= {"attributes": {"0": {"out_features": 4}}}
    assert Cuts.from_text(json.dumps(whole), where="note").indices() == {
        "0.weight": {0: [0, 1, 2, 3]}
    }
    with pytest.raises(BadFile, match=f"note: .*{says}"):
        Cuts.from_text(changed_note(whole, **changes), where="note")
    with pytest.raises(BadFile, match="note: the account of a shrink is malformed"):
        Cuts.from_text("[" * 100_000, where="note")


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"0": {"out_features": 9}}, "0.out_features: a size in the file does not fit.*at most 8"),
        ({"0": {"training": 0}}, "0.training: a size in the file"),
        ({"0": {"_version": 0}}, "0._version: a size in the file"),
        ({"0": {"forward": 0}}, "0.forward: a size in the file"),
        ({"7": {"out_features": 1}}, "7.out_features: a size in the file"),
        ({"0": {"out_features": [1, 2]}}, "0.out_features: a size in the file"),
    ],
)
def test_an_account_that_does_not_fit_changes_nothing(
    attributes: dict[str, dict[str, Any]], says: str
) -> None:
    kept = {0: Cut(8, np.arange(4))}
    cuts = Cuts(
        axes={"0.weight": kept, "0.bias": kept, "1.weight": {1: kept[0]}}, attributes=attributes
    )
    whole = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    arrays = kk.torch.to_arrays(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    with pytest.raises(Unsupported, match=says):
        kk.torch.fill_(whole, arrays, {"shrunk": cuts.to_text()})
    assert whole[0].weight.shape == (8, 3) and whole[0].out_features == 8


@pytest.mark.parametrize(
    ("size", "kept", "says"),
    [
        (4, [2, 1], "in increasing order"),
        (4, [1, 1], "in increasing order"),
        (4, [], "at least one"),
        (4, [0.5], "whole numbers"),
        (4, [3, 4], "outside of its axis; got 4; allowed: 0 to 3"),
        (4, [-1, 2], "outside of its axis; got -1"),
    ],
)
def test_kept_indices_are_checked(size: int, kept: list[Any], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        Cut(size, np.array(kept, None if kept else np.int64))
    with pytest.raises(InvalidArgument, match="of another size; got 5; allowed: 2"):
        Cut(size, np.array([0, 2])).then(Cut(5, np.array([0])))


RUN = """
import sys, torch
for path in sys.argv[1:]:
    network = torch.export.load(path).module()
    inputs, expected = torch.load(path + ".io")
    got = network(inputs)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max(), path
assert not any("karikomi" in name or "test_shrink" in name for name in sys.modules)
"""


def test_an_exported_program_runs_without_the_code_of_the_model(tmp_path: Path) -> None:
    cases = {"module": (heads(0), TOKENS), "graph": (Literal(), torch.randn(2, 3))}
    paths = []
    for form, (whole, inputs) in cases.items():
        small, report = shrink(whole, inputs, width=0.5)
        assert report.form == form
        path = str(tmp_path / f"{form}.pt2")
        torch.export.save(torch.export.export(small.eval(), (inputs,)), path)
        torch.save((inputs, small(inputs).detach()), path + ".io")
        paths.append(path)
    done = subprocess.run(
        [sys.executable, "-I", "-c", RUN, *paths], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
