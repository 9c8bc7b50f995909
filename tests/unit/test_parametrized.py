"""Layers that compute their weight: spectral norm, weight norm, orthogonal, the older hooks, LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

import karikomi as kk
from karikomi.errors import Unsupported
from karikomi.prune import OneShot
from karikomi.torch.bounding.in_place import VECTORS
from unit.test_attach import step


class AddAdapter(nn.Module):
    """LoRA written as a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.ones(1, 6)), nn.Parameter(torch.ones(8, 1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 0.1 * self.B @ self.A


def old_hook(name: str) -> Callable[[nn.Module], None]:
    def add(layer: nn.Module) -> None:
        with warnings.catch_warnings(action="ignore"):
            getattr(nn.utils, name)(layer)
        with torch.no_grad():  # so that the layer can be copied
            layer(torch.ones(1, 6))

    return add


BY_HOOK = ("weight_orig", "weight_g", "weight_v")
WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "LoRA": lambda layer: parametrize.register_parametrization(layer, "weight", AddAdapter()),
    "old spectral_norm": old_hook("spectral_norm"),
    "old weight_norm": old_hook("weight_norm"),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def network(way: Callable[[nn.Module], Any]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)
    model = nn.Sequential(*layers).eval()
    way(model[0])
    return model.eval()


def computed(model: nn.Module) -> set[str]:
    names = {name for name, _ in model.named_parameters() if name.startswith("0.")}
    return names - {"0.bias"}


def assert_listed(model: nn.Module, left_alone: Any) -> None:
    for name in computed(model):
        assert "weight is computed from it" in left_alone[name], name
        assert "makes it a weight" in left_alone[name]


BOUNDS = [
    kk.bound.Clamp(0.01),
    kk.bound.MaxNorm(0.01),
    kk.bound.InitScaled(0.01),
    kk.bound.SpectralCap(0.01),
]


@every_way
@pytest.mark.parametrize("rule", BOUNDS, ids=lambda rule: type(rule).__name__)
def test_a_bound_leaves_them_alone_by_name(way: Any, rule: Any) -> None:
    model = network(way)
    before = model[0].weight.detach().clone()
    outcome, state = kk.torch.bound_(model, rule)
    assert_listed(model, outcome.left_alone)
    assert not computed(model) & {*outcome.names, *state.get(VECTORS, {})}
    assert torch.equal(model[0].weight, before) and model[2].weight.abs().max() <= 0.01


@every_way
def test_a_bound_in_training_leaves_them_alone_by_name(way: Any) -> None:
    model = network(way)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = model[0].weight.detach().clone()
    handle = kk.torch.attach(optimizer, model, bound=kk.bound.Clamp(0.01), prune=OneShot(0.5))
    model(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    assert handle.last_bound is not None and handle.masks is not None
    assert_listed(model, handle.last_bound.left_alone)
    assert_listed(model, handle.masks.left_alone)
    torch.testing.assert_close(model[0].weight, before)


@every_way
def test_pruning_leaves_them_alone_by_name_and_quantizing_rounds_them(way: Any) -> None:
    model = network(way)
    masks = kk.torch.prune_(model, sparsity=0.5)
    assert_listed(model, masks.left_alone)
    assert set(masks) == {"2.weight", "4.weight"}
    coded = kk.torch.quantize_(model, bits=8, exclude="4.weight")
    assert coded.left_alone["4.weight"] == "not selected" and {"2.weight", "2.bias"} < set(coded)
    # What the weight of the first layer is computed from; the weight itself follows in the next run.
    assert computed(model) <= set(coded)
    for name in computed(model):
        assert torch.equal(model.get_parameter(name), torch.from_numpy(coded[name].decode())), name
    assert model(torch.ones(1, 6)).isfinite().all()


@every_way
def test_shrinking_goes_through_what_computes_them(way: Any) -> None:
    model = network(way)
    with torch.no_grad():
        model[2].weight[1:3] = 0.0
        model[2].bias[1:3] = 0.0
    small, report = kk.torch.shrink(model, torch.randn(2, 6))
    assert report.widths_after == {"0": 8, "2": 3, "4": 3}
    torch.testing.assert_close(small[0].weight, model[0].weight)
    inputs = torch.randn(5, 6)
    torch.testing.assert_close(small.eval()(inputs), model.eval()(inputs))


def test_recurrent_weights_that_are_computed_are_left_alone() -> None:
    cell = nn.LSTM(3, 4)
    with warnings.catch_warnings(action="ignore"):
        nn.utils.spectral_norm(cell, "weight_hh_l0")
    cell(torch.ones(2, 3))
    outcome, _ = kk.torch.bound_(cell, kk.bound.MaxNorm(0.01))
    assert "weight_hh_l0 is computed from it" in outcome.left_alone["weight_hh_l0_orig"]
    masks = kk.torch.prune_(cell, sparsity=0.5, protect=())
    assert set(masks) == {"weight_ih_l0"}


@pytest.mark.parametrize("leaf", ["in_proj_weight", "out_proj"])
def test_attention_that_computes_its_weights_is_none_that_is_known(leaf: str) -> None:
    layer = nn.MultiheadAttention(8, 2)
    part, name = (layer.out_proj, "weight") if leaf == "out_proj" else (layer, leaf)
    parametrizations.weight_norm(part, name)
    with pytest.raises(Unsupported, match="no attention that is known"):
        kk.torch.bound_(layer, kk.bound.QKClip(1.0), logits={"": [10.0, 1.0]})
    masks = kk.torch.prune_(layer, sparsity=0.5, protect=())
    assert f"{name} is computed from it" in next(
        w for n, w in masks.left_alone.items() if "original0" in n
    )


def test_the_way_out_makes_a_weight_that_is_bounded() -> None:
    model = network(WAYS["spectral_norm"])
    parametrize.remove_parametrizations(model[0], "weight")
    outcome, _ = kk.torch.bound_(model, kk.bound.Clamp(0.01))
    assert model[0].weight.abs().max() <= 0.01 and not outcome.left_alone


def test_a_weight_that_torch_masks_is_clamped() -> None:
    layer = nn.Linear(6, 8)
    torch_prune.random_unstructured(layer, "weight", 0.5)
    outcome, _ = kk.torch.bound_(layer, kk.bound.Clamp(0.01))
    layer(torch.ones(1, 6))
    assert layer.weight.abs().max() <= 0.01 and not outcome.left_alone
    with pytest.raises(Unsupported, match=r"masked by torch.nn.utils.prune"):
        kk.torch.bound_(layer, kk.bound.UnitNorm())


class Adapted(nn.Module):
    """A layer with an adapter, under the names of PEFT; as there, B begins at zero."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    def merge(self) -> nn.Linear:
        self.base_layer.weight.data += self.lora_B["default"].weight @ self.lora_A["default"].weight
        return self.base_layer


class Wrapper(nn.Module):
    """The two levels that PEFT puts around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_model.model(x)


def adapted() -> tuple[Wrapper, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    masks = kk.torch.prune_(model, sparsity=0.5)
    model.requires_grad_(False)
    for place in (0, 2):
        model[place] = Adapted(model[place])
    return Wrapper(model), masks, [p for p in model.parameters() if p.requires_grad]


def test_adapters_that_are_all_zero_are_warned_of_when_they_are_pruned_away() -> None:
    model, _, trained = adapted()
    with pytest.warns(
        UserWarning, match=r"of 2 tensor.s. were zero.*lora_B.default.weight.*exclude="
    ):
        masks = kk.torch.prune_(model, sparsity=0.6)
    lost = {name for name in masks.emptied if "lora_B" in name}
    assert len(lost) == 2
    with warnings.catch_warnings(action="error"):
        kk.torch.prune_(model, sparsity=0.7, masks=masks)  # said before
        kk.torch.prune_(adapted()[0], sparsity=0.6, exclude="*lora_B*")
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model, _, trained = adapted()
    optimizer = torch.optim.SGD(trained, lr=0.1)
    kk.torch.attach(optimizer, model, prune=OneShot(0.5, step=0))
    model(torch.ones(1, 6)).sum().backward()
    for item in trained:
        item.grad.zero_()
    with pytest.warns(UserWarning, match="cannot be trained"):
        optimizer.step()


def test_a_bound_leaves_weights_with_adapters_alone_until_they_are_merged() -> None:
    model, _, _ = adapted()
    layer: Any = model.base_model.model[0]
    before = layer.base_layer.weight.clone()
    outcome, _ = kk.torch.bound_(model, kk.bound.Clamp(0.01))
    name = "base_model.model.0.base_layer.weight"
    assert "merge the adapter first" in outcome.left_alone[name]
    assert torch.equal(layer.base_layer.weight, before)
    layer.merged = True
    outcome, _ = kk.torch.bound_(model, kk.bound.Clamp(0.01))
    assert name not in outcome.left_alone and layer.base_layer.weight.abs().max() <= 0.01


def test_merging_adapters_into_a_pruned_network_keeps_its_masks() -> None:
    model, masks, trained = adapted()
    optimizer = torch.optim.SGD(trained, lr=0.1)
    handle = kk.torch.attach(optimizer, model, prune=masks)
    for seed in range(3):
        step(model, optimizer, seed)
    assert handle.sparsity == 0.5
    inner: Any = model.base_model.model
    with torch.no_grad():
        for place in (0, 2):
            inner[place] = inner[place].merge()
    dense = [inner[place].weight.clone() for place in (0, 2)]
    assert all((weight != 0).all() for weight in dense)
    with pytest.warns(UserWarning, match=r"36 masked weight.s. .* masked again now"):
        handle.detach()
    for weight, before, mask in zip(
        (inner[0].weight, inner[2].weight), dense, masks.values(), strict=True
    ):
        assert torch.equal(weight, before * mask)
    # By hand, in the network without its wrappers.
    with torch.no_grad():
        inner[0].weight += 1.0
    masks.apply_(inner)
    assert np.array_equal((inner[0].weight == 0).numpy(), ~masks["0.weight"].numpy())
