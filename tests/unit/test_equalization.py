"""Rewrites before quantization: the network computes the same, and each formula is the paper's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import karikomi as kk
from karikomi.errors import InvalidArgument

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional


class Mixed(nn.Module):
    """Convolutions of several kinds, a flattening and linear layers; batch norms between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.point, self.norm2 = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
        self.inner, self.norm3 = nn.Linear(4 * 16, 12), nn.BatchNorm1d(12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Any) -> Any:
        x = F.relu(self.norm1(self.first(x)))
        x = F.max_pool2d(F.leaky_relu(self.depthwise(x)), 2)
        x = F.relu(self.norm2(self.point(x))).flatten(1)
        return self.out(F.relu(self.norm3(self.inner(x))))


class Attention(nn.Module):
    """A pre-norm block: one norm read by three projections, one by a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.last = nn.LayerNorm(8), nn.RMSNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.up = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Any) -> Any:
        y = self.norm1(x)
        x = x + F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        return self.last(x + F.gelu(self.up(self.norm2(x))))


def made(kind: type, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    network = kind()
    with torch.no_grad():
        for item in network.modules():
            if getattr(item, "running_mean", None) is not None:
                item.running_mean.normal_()
                item.running_var.uniform_(0.3, 3)
            if isinstance(item, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.RMSNorm):
                item.weight.uniform_(-2, 2)
            if isinstance(item, nn.Linear | nn.Conv2d):
                item.weight.mul_(
                    torch.logspace(-1, 1, len(item.weight)).reshape(
                        -1, *[1] * (item.weight.dim() - 1)
                    )
                )
    return network.eval()


IMAGES = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))


def near(got: Any, expected: Any) -> bool:
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_a_folded_network_computes_the_same():
    network = made(Mixed)
    before = network(IMAGES)
    done = kk.torch.fold_batch_norms_(network, IMAGES)
    assert done.folded == {
        "norm1": "first.weight",
        "norm2": "point.weight",
        "norm3": "inner.weight",
    }
    assert not done.left_alone and near(network(IMAGES), before)
    assert not any(isinstance(item, nn.BatchNorm2d) for item in network.modules())


def test_folding_is_the_formula():
    layer, norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, eps=0.1)
    nn.init.normal_(norm.weight)
    norm.running_var.uniform_(0.5, 2)
    norm.running_mean.normal_()
    weight, bias = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
    gain = norm.weight.detach().numpy() / np.sqrt(norm.running_var.numpy() + 0.1)
    shift = (bias - norm.running_mean.numpy()) * gain + norm.bias.detach().numpy()
    kk.torch.fold_batch_norms_(nn.Sequential(layer, norm), torch.zeros(1, 2, 4, 4))
    assert np.allclose(layer.weight.detach(), weight * gain.reshape(-1, 1, 1, 1), atol=1e-6)
    assert np.allclose(layer.bias.detach(), shift, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_take_norms_too(groups):
    network = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2, groups=groups), nn.BatchNorm2d(6)).eval()
    nn.init.uniform_(network[1].weight, -2, 2)
    x = torch.randn(2, 4, 5, 5)
    before = network(x)
    kk.torch.quantize_(network, bits=8)
    rounded = network(x)
    assert kk.torch.fold_batch_norms_(network, x).folded == {"1": "0.weight"}
    assert near(network(x), rounded) and not near(rounded, before)


def test_codes_are_folded_without_loss():
    network = made(Mixed)
    codes = kk.torch.quantize_(network, bits=4)
    rounded = network(IMAGES)
    kk.torch.fold_batch_norms_(network, IMAGES)
    assert near(network(IMAGES), rounded)
    from karikomi.torch.modules.codes import recall

    after = recall(network)["first.weight"]
    assert np.array_equal(np.abs(after.codes), np.abs(codes["first.weight"].codes))


def test_norms_that_cannot_be_folded_are_named():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.twice = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.shared, self.first = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.other, self.batch = nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)

        def forward(self, x: Any) -> Any:
            y = self.twice(self.first(x))
            z = self.layer(self.other(y) + y)
            return self.batch(z) + self.shared(self.shared(z))

    done = kk.torch.fold_batch_norms_(made(Net), IMAGES)
    assert not done.folded
    assert done.left_alone["first"] == "no layer makes its input"
    assert done.left_alone["other"] == "its input has another reader"
    assert done.left_alone["shared"] == "it is used more than once"
    assert done.left_alone["batch"] == "it has no running statistics"


@pytest.mark.parametrize("seed", range(3))
def test_an_equalized_network_computes_the_same_with_like_ranges(seed):
    network = made(Mixed, seed)
    kk.torch.fold_batch_norms_(network, IMAGES)
    before = network(IMAGES)
    done = kk.torch.equalize_(network, IMAGES)
    assert done.pairs == {
        "first.weight": "depthwise.weight",
        "depthwise.weight": "point.weight",
        "point.weight": "inner.weight",
        "inner.weight": "out.weight",
    }
    assert list(done.left_alone) == ["out.weight"] and near(network(IMAGES), before)
    rows = network.inner.weight.abs().amax(1)
    columns = network.out.weight.abs().amax(0)
    assert torch.allclose(rows, columns, rtol=0.05)


def test_equalization_is_the_formula():
    network = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 4))
    first, second = (network[at].weight.detach().numpy().copy() for at in (0, 2))
    factor = np.sqrt(np.abs(first).max(1) / np.abs(second).max(0))
    kk.torch.equalize_(network, torch.zeros(1, 3))
    assert np.allclose(network[0].weight.detach(), first / factor[:, None], rtol=1e-5)
    assert np.allclose(network[2].weight.detach(), second * factor, rtol=1e-5)


def test_smoothing_is_the_formula_and_keeps_the_outputs():
    network = made(Attention)
    before = network(TOKENS)
    normed = network.norm1(TOKENS).reshape(-1, 8).abs().amax(0)
    weights = [layer.weight.detach().clone() for layer in (network.q, network.k, network.v)]
    ranges = torch.stack(weights).abs().amax((0, 1))
    scale = network.norm1.weight.detach().clone()
    done = kk.torch.smooth_(network, TOKENS, data=[TOKENS], alpha=0.7)
    assert done.norms == {
        "norm1.weight": ["q.weight", "k.weight", "v.weight"],
        "norm2.weight": ["up.weight"],
    }
    assert list(done.left_alone) == ["last.weight"] and near(network(TOKENS), before)
    factors = normed**0.7 / ranges**0.3
    assert torch.allclose(network.norm1.weight, scale / factors, rtol=1e-5)
    assert torch.allclose(network.q.weight, weights[0] * factors, rtol=1e-5)


@pytest.mark.parametrize("kind", [nn.Linear(6, 5), nn.Conv2d(3, 5, 3, groups=1, bias=False)])
def test_corrected_biases_take_the_mean_error_away(kind):
    layer = copy.deepcopy(kind)
    x = torch.rand(40, 6) if isinstance(layer, nn.Linear) else torch.rand(8, 3, 6, 6)
    dense = copy.deepcopy(layer)
    network = nn.Sequential(layer)
    codes = kk.torch.quantize_(network, bits=2)
    axes = (0,) if x.dim() == 2 else (0, 2, 3)
    error = (network(x) - dense(x)).mean(axes).detach()
    done = kk.torch.correct_biases_(network, nn.Sequential(dense), data=[x[:4], x[4:]])
    assert done.shifts["0.weight"] == pytest.approx(float(error.abs().mean()), rel=1e-4)
    after = (network(x) - dense(x)).mean(axes).detach()
    assert float(after.abs().max()) < 1e-5 * float(error.abs().max() + 1)
    assert torch.equal(layer.weight, torch.from_numpy(codes["0.weight"].decode()))


def test_what_is_wrong_is_named():
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    x = torch.zeros(1, 3)
    with pytest.raises(InvalidArgument, match="nothing here is quantized"):
        kk.torch.correct_biases_(network, network, data=[x])
    with pytest.raises(InvalidArgument, match="alpha"):
        kk.torch.smooth_(network, x, data=[x], alpha=2)
    kk.torch.quantize_(network, bits=8)
    done = kk.torch.equalize_(network, x)
    assert not done.pairs and "rescale before quantize_" in done.left_alone["0.weight"]
