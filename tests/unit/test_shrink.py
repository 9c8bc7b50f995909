"""Shrinking torch modules: truly smaller, computing the same, and refused where that cannot be."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from karikomi.torch.pruning.in_place import prune_
from karikomi.torch.shrinking.smaller_copy import shrink


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def same(module: nn.Module, small: nn.Module, inputs: torch.Tensor) -> float:
    """Return the relative difference on fresh random inputs, asked independently of `shrink`."""
    fresh = torch.randn(inputs.shape, dtype=inputs.dtype)
    with torch.no_grad():
        expected, got = copy.deepcopy(module).eval()(fresh), copy.deepcopy(small).eval()(fresh)
    return float((expected - got).abs().max() / expected.abs().max())


def kill(layer: nn.Module, *units: int, bias: float | None = None) -> None:
    """Zero what some units of a layer read, and set their biases."""
    with torch.no_grad():
        layer.weight[list(units)] = 0.0
        if bias is not None:
            layer.bias[list(units)] = bias


def unread(layer: nn.Module, *columns: int) -> None:
    """Zero what a layer reads of some of its inputs."""
    with torch.no_grad():
        layer.weight[:, list(columns)] = 0.0


class Conv(nn.Module):
    """LeNet-like, all functional; `pad` pads the second convolution."""

    def __init__(self, pad: int = 0, flatten: Callable[[torch.Tensor], torch.Tensor] | None = None):
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.c2 = nn.Conv2d(6, 8, 3, padding=pad)
        size = 3 if pad else 2
        self.f1, self.f2 = nn.Linear(8 * size * size, 12), nn.Linear(12, 5)
        self.flatten = flatten or (lambda x: torch.flatten(x, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.n1(self.c1(x))), 2)
        x = F.avg_pool2d(torch.tanh(self.c2(x)), 2)
        x = F.dropout(self.flatten(x), training=self.training)
        return F.log_softmax(self.f2(F.gelu(self.f1(x))), dim=1)


IMAGE = torch.randn(2, 1, 14, 14)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_lenet_300_100_at_99_percent() -> None:
    net = mlp(784, 300, 100, 10)
    prune_(net, sparsity=0.99)
    small, report = shrink(net, torch.randn(1, 784))
    assert same(net, small, torch.randn(64, 784)) <= 1e-6
    assert report.max_difference <= 1e-6
    assert report.widths_before == {"0": 300, "2": 100, "4": 10}
    assert report.widths_after["2"] < 100 and report.widths_after["4"] == 10
    assert report.parameters_after == sum(p.numel() for p in small.parameters())
    assert report.parameters_after < report.parameters_before == 266_610
    assert small[2].out_features == small[4].in_features == report.widths_after["2"]
    assert "outputs" in report.left_alone["4"]


@pytest.mark.parametrize("sparsity", [0.9, 0.98, 0.995])
def test_after_a_shrink_there_is_nothing_to_shrink(sparsity: float) -> None:
    net = mlp(20, 60, 40, 30, 5)
    prune_(net, sparsity=sparsity)
    small, first = shrink(net, torch.randn(3, 20))
    again, second = shrink(small, torch.randn(3, 20))
    assert first.removed > 0 and second.removed == 0
    assert second.widths_after == first.widths_after
    assert same(net, again, torch.randn(50, 20)) <= 1e-6


def test_the_module_that_was_given_is_not_touched() -> None:
    net = mlp(4, 9, 3).train()
    net[0].bias.requires_grad_(False)
    net[2].eval()
    kill(net[0], 1, 2, 3)
    before = copy.deepcopy(net.state_dict())
    small, report = shrink(net, torch.randn(2, 4))
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())
    assert net[0].out_features == 9 and net.training and report.removed == 3
    assert [part.training for part in small.modules()] == [part.training for part in net.modules()]
    assert small[0].weight.requires_grad and not small[0].bias.requires_grad
    assert isinstance(small[0].weight, nn.Parameter)


def test_a_constant_is_folded_as_by_hand() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2)).double()
    kill(net[0], 2, bias=0.7)
    constant = 1 / (1 + torch.exp(torch.tensor(-0.7, dtype=torch.float64)))
    expected = net[2].bias + net[2].weight[:, 2] * constant
    small, report = shrink(net, torch.randn(2, 3, dtype=torch.float64))
    torch.testing.assert_close(small[2].bias, expected, rtol=1e-15, atol=0)
    assert torch.equal(small[2].weight, net[2].weight[:, [0, 1, 3]])
    assert torch.equal(small[0].weight, net[0].weight[[0, 1, 3]])
    assert report.removed == 1 and small[0].weight.dtype is torch.float64


def test_what_nobody_reads_goes() -> None:
    net = mlp(3, 6, 2)
    unread(net[2], 0, 5)
    small, report = shrink(net, torch.randn(2, 3))
    assert report.widths_after == {"0": 4, "2": 2}
    assert torch.equal(small[0].weight, net[0].weight[1:5])


def test_cascades_run_both_ways() -> None:
    net = mlp(3, 8, 7, 6, 2)
    kill(net[0], *range(1, 8), bias=0.5)
    with torch.no_grad():
        net[2].weight[3:, 0] = 0.0  # these read only units that are about to be folded
    unread(net[6], *range(2, 6))
    small, report = shrink(net, torch.randn(2, 3))
    assert report.widths_after == {"0": 1, "2": 3, "4": 2, "6": 2}
    assert same(net, small, torch.randn(9, 3)) <= 1e-6


def test_a_dead_network_keeps_one_unit_a_layer() -> None:
    net = mlp(3, 5, 4, 2)
    for layer in (net[0], net[2], net[4]):
        kill(layer, *range(len(layer.weight)))
    small, report = shrink(net, torch.randn(2, 3))
    assert report.widths_after == {"0": 1, "2": 1, "4": 2}
    assert "keeps one unit" in report.left_alone["0"]
    assert small[0].in_features == 3


def test_inputs_and_outputs_stay_though_dead() -> None:
    net = mlp(5, 4, 3)
    unread(net[0], 0, 1)
    kill(net[2], 0)
    small, report = shrink(net, torch.randn(2, 5))
    assert report.removed == 0 and small(torch.randn(1, 5)).shape == (1, 3)


def test_convolutions_norms_pools_and_flatten() -> None:
    net = Conv()
    net.train()(torch.randn(8, 1, 14, 14))  # so that the statistics are not trivial
    kill(net.c1, 0, 3)
    kill(net.c2, 2, 7, bias=0.3)
    unread(net.c2, 5)
    unread(net.f1, *range(4, 8))  # the four places of channel 1
    unread(net.f1, 0, 1, 2)  # three of the four places of channel 0: it stays
    kill(net.f1, 4)
    small, report = shrink(net, IMAGE)
    assert report.widths_after == {"c1": 3, "c2": 5, "f1": 11, "f2": 5}
    assert small.f1.in_features == 20 and small.n1.num_features == 3
    assert small.c2.weight.shape == (5, 3, 3, 3)
    assert same(net, small, IMAGE) <= 1e-6
    assert small.training and not bool((small.n1.running_var - net.n1.running_var[[1, 2, 4]]).any())


def test_a_norm_with_scale_zero_kills_its_unit() -> None:
    net = Conv()
    with torch.no_grad():
        net.n1.weight[2], net.n1.bias[2] = 0.0, 0.8
    small, report = shrink(net, IMAGE)
    assert report.widths_after["c1"] == 5 and same(net, small, IMAGE) <= 1e-6


def test_no_constant_crosses_zero_padding() -> None:
    net = Conv(pad=1)
    with torch.no_grad():
        net.n1.bias.fill_(0.5)
        net.n1.bias[4] = -1.0  # which the ReLU makes zero: it may go
    kill(net.c1, 1, 4, bias=0.0)
    small, report = shrink(net, IMAGE)
    assert report.widths_after["c1"] == 5
    assert report.left_alone["c1"].startswith("unit 1 is constant, but c2 pads with zeros")
    assert same(net, small, IMAGE) <= 1e-6


@pytest.mark.parametrize(
    ("second", "kept"),
    [
        ({"padding": "same"}, 4),
        ({"padding": "valid"}, 3),
        ({"padding": 1, "padding_mode": "reflect"}, 3),
        ({"bias": False}, 4),
    ],
)
def test_what_a_reader_may_take(second: dict[str, object], kept: int) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, **second))  # type: ignore[arg-type]
    kill(net[0], 2, bias=1.5)
    images = torch.randn(2, 2, 9, 9)
    small, report = shrink(net, images)
    assert report.widths_after["0"] == kept and ("0" in report.left_alone) == (kept == 4)
    assert same(net, small, images) <= 1e-6


def test_a_pool_that_averages_padding_in_keeps_its_constant() -> None:
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.AvgPool1d(3, 1, padding=1), nn.Conv1d(4, 2, 3))
    kill(net[0], 0, bias=1.0)
    small, report = shrink(net, torch.randn(2, 1, 12))
    assert report.removed == 0 and "not the same everywhere" in report.left_alone["0"]


def test_flattened_constants_may_differ_by_place() -> None:
    net = nn.Sequential(
        nn.Conv1d(1, 4, 3), nn.AvgPool1d(3, 1, padding=1), nn.Flatten(), nn.Linear(40, 2)
    )
    kill(net[0], 0, bias=1.0)
    series = torch.randn(2, 1, 12)
    small, report = shrink(net, series)
    assert report.widths_after["0"] == 3 and same(net, small, series) <= 1e-6


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.view(x.size(0), -1),
        lambda x: x.view(x.shape[0], -1),
        lambda x: x.reshape(-1, x.size(1) * x.size(2) * x.size(3)),
        lambda x: x.flatten(start_dim=1),
        lambda x: torch.reshape(x, (x.shape[0], -1)),
    ],
)
def test_ways_to_flatten(flatten: Callable[[torch.Tensor], torch.Tensor]) -> None:
    net = Conv(flatten=flatten)
    kill(net.c2, 0, 4, bias=0.3)
    small, report = shrink(net, IMAGE)
    assert report.widths_after["c2"] == 6 and same(net, small, IMAGE) <= 1e-6


def test_a_width_that_the_forward_writes_is_changed_in_the_graph() -> None:
    net = Conv(flatten=lambda x: x.view(-1, 32))
    kill(net.c2, 0, 4)
    kill(net.f1, 3)
    small, report = shrink(net, IMAGE)
    assert report.widths_after["c2"] == 6 and report.widths_after["f1"] == 11
    assert report.form == "graph" and same(net, small, IMAGE) <= 1e-6
    assert f"view at {__file__}:" in report.literals[0] and "32 -> 24" in report.literals[0]


def test_sequences_keep_their_places() -> None:
    net = mlp(4, 8, 3)
    kill(net[0], 5)
    tokens = torch.randn(2, 7, 4)
    small, report = shrink(net, tokens)
    assert report.removed == 1 and same(net, small, tokens) <= 1e-6


def test_anything_may_stand_before_the_first_and_after_the_last_layer() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(7, 4), nn.Linear(12, 8), nn.Linear(8, 4)

        def forward(self, tokens: torch.Tensor, scale: float = 2.0) -> dict[str, torch.Tensor]:
            x = self.embed(tokens) + self.embed.weight[:1]
            x = self.b(F.silu(self.a(x.view(-1, 12)))) * scale
            return {"logits": x.softmax(-1).cumsum(0), "raw": x}

    net = Odd()
    kill(net.a, 1, 2)
    small, report = shrink(net, (torch.randint(0, 7, (2, 3)),))
    assert report.widths_after == {"embed": 4, "a": 6, "b": 4}
    tokens = torch.randint(0, 7, (5, 3))
    torch.testing.assert_close(small(tokens)["raw"], net(tokens)["raw"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    net = mlp(6, 30, 20, 4).to(dtype)
    kill(net[0], *range(15), bias=0.25)
    small, report = shrink(net, torch.randn(3, 6, dtype=dtype))
    assert report.widths_after["0"] == 15 and small[2].bias.dtype is dtype


def test_random_chains_stay_exact() -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        net = Conv(pad=seed % 2)
        net.train()(torch.randn(8, 1, 14, 14))
        prune_(net, sparsity=0.93 + seed / 200)
        small, report = shrink(net, IMAGE)
        assert same(net, small, IMAGE) <= 2e-6
        assert report.removed > 0
