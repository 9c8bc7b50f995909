"""Facts measured on torch networks, against hand-worked networks and plain autograd."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from karikomi.errors import InvalidArgument, KarikomiError, NonFinite, UnknownName, Unsupported
from karikomi.torch.facts.measure import MEASURED, following, measure

MSE = F.mse_loss


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one for name, one in module.named_parameters() if one.dim() > 1}


def of(module: nn.Module, fact: str, data: Any, loss: Any = None, **more: Any) -> Any:
    weights = more.pop("weights", weights_of(module))
    return measure(module, {fact}, weights, data=data, loss=loss, progress=False, **more)[fact]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def pairs(count: int = 3, size: int = 5, inputs: int = 3, outputs: int = 2) -> list[Any]:
    torch.manual_seed(7)
    return [
        (torch.randn(size, inputs).double(), torch.randn(size, outputs).double())
        for _ in range(count)
    ]


# --- gradients ---------------------------------------------------------------------------------


def test_gradient_of_one_weight_by_hand() -> None:
    layer = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(layer.weight, 2.0)
    # L = (w x - y)^2: L' = 2 x (w x - y) = 2 * 3 * (6 - 5) = 6, and 2 * 1 * (2 - 0) = 4; L'' = 2 x^2.
    data = [(torch.tensor([[3.0]]).double(), torch.tensor([[5.0]]).double())]
    data += [(torch.tensor([[1.0]]).double(), torch.tensor([[0.0]]).double())]
    found = measure(
        layer,
        {"gradient", "squared_gradient", "hessian_gradient"},
        ["weight"],
        data=data,
        loss=MSE,
        progress=False,
    )
    assert found["gradient"]["weight"].item() == 5.0
    assert found["squared_gradient"]["weight"].item() == (36 + 16) / 2
    assert found["hessian_gradient"]["weight"].item() == (18 + 2) / 2 * 5.0


def test_gradients_equal_autograd() -> None:
    net, data = small(), pairs()
    reference = copy.deepcopy(net)
    sum(MSE(reference(x), y) for x, y in data).div(len(data)).backward()  # type: ignore[union-attr]
    got = of(net, "gradient", data, MSE)
    for name, one in weights_of(reference).items():
        close(got[name], one.grad, 1e-12)  # type: ignore[arg-type]


def test_squared_gradients_with_single_examples_are_the_fisher_diagonal() -> None:
    net = small()
    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in pairs() for i in range(len(x))]
    expected = torch.zeros_like(net[0].weight)
    for x, y in singles:
        (gradient,) = torch.autograd.grad(MSE(net(x), y), [net[0].weight])
        expected += gradient**2 / len(singles)
    close(of(net, "squared_gradient", singles, MSE)["0.weight"], expected, 1e-12)


def test_hessian_times_gradient_equals_the_full_hessian() -> None:
    net, data = small(), pairs()
    names = list(weights_of(net))

    def value(*given: torch.Tensor) -> torch.Tensor:
        held = dict(zip(names, given, strict=True))
        losses = [MSE(torch.func.functional_call(net, held, (x,)), y) for x, y in data]
        return torch.stack(losses).mean()

    points = tuple(weights_of(net).values())
    gradients = torch.autograd.functional.jacobian(value, points)
    blocks = torch.autograd.functional.hessian(value, points)
    got = of(net, "hessian_gradient", data, MSE)
    for row, name in enumerate(names):
        products = [
            blocks[row][column].flatten(-2).flatten(0, 1) @ gradients[column].flatten()
            for column in range(len(names))
        ]
        close(got[name].flatten(), sum(products), 1e-10)  # type: ignore[arg-type]


def test_a_loss_that_is_linear_has_no_hessian() -> None:
    layer = nn.Linear(2, 1)
    got = of(layer, "hessian_gradient", [(torch.ones(1, 2), None)], lambda out, _: out.sum())
    assert got["weight"].tolist() == [[0.0, 0.0]]


def test_attention_has_a_hessian_where_fused_kernels_have_none() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    data = [(torch.randn(2, 4, 8), torch.randn(2, 4, 8))]
    assert all(one.any() for one in of(net, "hessian_gradient", data, MSE).values())


def test_recurrent_and_frozen_weights_have_gradients() -> None:
    torch.manual_seed(0)
    net = nn.LSTM(3, 4).requires_grad_(False)
    got = of(net, "gradient", [(torch.randn(5, 2, 3), None)], lambda out, _: out[0].square().mean())
    assert set(got) == {"weight_ih_l0", "weight_hh_l0"}
    assert all(one.any() for one in got.values())
    assert not any(one.requires_grad for one in net.parameters())


def test_a_tied_weight_gathers_the_gradients_of_all_its_uses() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(x)))

    torch.manual_seed(1)
    net, x = Tied().double(), torch.randn(4, 3).double()
    (expected,) = torch.autograd.grad(net(x).square().mean(), [net.first.weight])
    loss = lambda out, _: out.square().mean()  # noqa: E731
    close(of(net, "gradient", [(x, None)], loss)["first.weight"], expected, 1e-12)
    close(
        of(net, "gradient", [(x, None)], loss, weights=["second.weight"])["second.weight"], expected
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_do_not_underflow(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 2).to(dtype)
    x = torch.randn(4, 3).to(dtype)
    tiny = of(net, "squared_gradient", [(x, None)], lambda out, _: out.square().mean() * 1e-9)
    assert tiny["weight"].dtype == torch.float32
    (one,) = torch.autograd.grad(
        F.linear(x.float(), w := net.weight.detach().float().requires_grad_(), net.bias.float())
        .square()
        .mean()
        * 1e-9,
        [w],
    )
    close(tiny["weight"] * 1e18, one.square() * 1e18)


def test_a_weight_that_the_loss_never_meets_has_a_gradient_of_zero() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    got = of(Branch(), "gradient", [(torch.ones(1, 2), None)], lambda out, _: out.sum())
    assert got["unused.weight"].tolist() == [[0.0, 0.0]]
    assert got["used.weight"].tolist() == [[1.0, 1.0]]


# --- flow --------------------------------------------------------------------------------------


def test_flow_by_hand() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2.0], [0.0, 3.0]]))
        net[1].weight.copy_(torch.tensor([[-4.0, 5.0]]))
    got = of(net, "flow", [torch.zeros(9, 2)])
    # dR/d|w|: 4 and 5 for the rows of the first, 3 for the second; the largest becomes 1.
    close(got["0.weight"] * 5, torch.tensor([[4.0, 4.0], [5.0, 5.0]]))
    close(got["1.weight"] * 5, torch.tensor([[3.0, 3.0]]))


def test_a_network_of_zeros_has_no_flow() -> None:
    net = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(net.weight)
    double = nn.Sequential(net, net)
    net.weight = nn.Parameter(torch.zeros(2, 2))
    assert of(double, "flow", [torch.zeros(1, 2)])["0.weight"].tolist() == [[0.0] * 2] * 2


def test_flow_is_conserved_from_layer_to_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5, bias=False)
    )
    got = of(net, "flow", [(torch.zeros(1, 2, 6, 6), None)])
    sums = [(got[name] * one.abs()).sum() for name, one in weights_of(net).items()]
    close(sums[0].detach(), sums[1].detach())


def test_flow_of_a_deep_network_neither_overflows_nor_vanishes() -> None:
    deep = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(100)))
    for factor in (1e2, 1e-3):
        with torch.no_grad():
            for one in deep.parameters():
                one.fill_(factor)
        flow = of(deep, "flow", [torch.zeros(1, 8)])
        assert all(bool((one.float() == 1).all()) for one in flow.values())


def test_flow_wants_fractions() -> None:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with pytest.raises(Unsupported, match="whole numbers"):
        of(net, "flow", [torch.zeros(1, 4, dtype=torch.long)], weights=["1.weight"])


# --- inputs ------------------------------------------------------------------------------------


def test_input_norm_of_a_linear_layer_over_tokens_and_batches() -> None:
    torch.manual_seed(0)
    layer, data = nn.Linear(3, 2), [torch.randn(2, 5, 3), torch.randn(1, 4, 3)]
    rows = torch.cat([one.reshape(-1, 3) for one in data])
    close(of(layer, "input_norm", data)["weight"], rows.norm(dim=0)[None])


def unfolded(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what each weight multiplies, (outputs, units, inputs, kernel ...), found by derivatives."""
    weight = layer.weight.detach().clone().requires_grad_()

    def outputs(w: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"weight": w}, (x,)).flatten()

    return torch.autograd.functional.jacobian(outputs, weight)


CONVOLUTIONS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "1d": lambda: (nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 2, 9)),
    "2d": lambda: (nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(1, 0)), (2, 2, 5, 6)),
    "3d": lambda: (nn.Conv3d(1, 2, 2, dilation=2), (1, 1, 4, 5, 4)),
    "groups": lambda: (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 4, 4)),
    "depthwise": lambda: (nn.Conv2d(3, 6, 3, groups=3), (2, 3, 5, 5)),
    "same": lambda: (nn.Conv2d(2, 2, (3, 4), padding="same", dilation=(1, 2)), (1, 2, 5, 8)),
    "same, uneven": lambda: (nn.Conv1d(2, 2, 4, padding="same"), (1, 2, 8)),
    "valid": lambda: (nn.Conv2d(2, 2, 2, padding="valid"), (1, 2, 4, 4)),
    "circular": lambda: (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (1, 2, 4, 4)),
    "one example": lambda: (nn.Conv2d(2, 2, 3), (2, 4, 4)),
    "transposed 1d": lambda: (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), (2, 2, 4)),
    "transposed 2d": lambda: (
        nn.ConvTranspose2d(2, 3, 3, stride=2, padding=2, output_padding=1, dilation=2),
        (2, 2, 4, 3),
    ),
    "transposed groups": lambda: (nn.ConvTranspose2d(4, 2, 2, groups=2), (1, 4, 3, 3)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_input_norm_of_convolutions_is_that_of_what_each_weight_multiplies(kind: str) -> None:
    torch.manual_seed(3)
    layer, shape = CONVOLUTIONS[kind]()
    layer, x = layer.double(), torch.randn(shape).double()
    weight = layer.get_parameter("weight")
    got = of(layer, "input_norm", [x])["weight"]
    close(got.expand(weight.shape), unfolded(layer, x).norm(dim=0), 1e-10)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("kind", [one for one in CONVOLUTIONS if "transposed" not in one])
def test_gram_of_convolutions_has_the_loss_of_a_changed_weight(kind: str) -> None:
    torch.manual_seed(4)
    layer, shape = CONVOLUTIONS[kind]()
    layer, x = layer.double(), torch.randn(shape).double()
    weight = layer.get_parameter("weight")
    (gram,) = of(layer, "gram", [x]).values()
    change = torch.randn_like(weight)
    with torch.no_grad():
        before = layer(x)
        weight += change
        error = (layer(x) - before).square()
    rows = error.numel() // len(weight)
    deltas = change.flatten(1).unflatten(0, (len(gram), -1))
    expected = torch.einsum("gud,gde,gue->", deltas, gram, deltas) * rows
    close(expected.detach(), error.sum(), 1e-10)


def test_gram_over_batches_of_different_sizes() -> None:
    torch.manual_seed(0)
    layer, data = nn.Linear(3, 2), [torch.randn(4, 3), torch.randn(1, 2, 3)]
    rows = torch.cat([one.reshape(-1, 3) for one in data])
    close(of(layer, "gram", data)["weight"], (rows.T @ rows / len(rows))[None])


def test_blocks_of_rows_change_no_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 2))
    data = [torch.randn(5, 2, 4, 4)]
    whole = of(net, "gram", data)
    monkeypatch.setattr("karikomi.torch.facts.inputs._BLOCK", 100)
    for name, one in of(net, "gram", data).items():
        close(one, whole[name])


def test_gram_refuses_transposed_convolutions() -> None:
    with pytest.raises(Unsupported, match="gram: weight: .*transposed"):
        of(nn.ConvTranspose1d(1, 1, 2), "gram", [torch.zeros(1, 1, 3)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_inputs_do_not_overflow(dtype: torch.dtype) -> None:
    layer = nn.Linear(2, 1).to(dtype)
    x = torch.full((1000, 2), 3e4).to(dtype)
    close(
        of(layer, "input_norm", [x / 2])["weight"] / 1e5, (x / 2).double().norm(dim=0)[None] / 1e5
    )


def test_norms_of_huge_inputs_do_not_overflow() -> None:
    net = nn.Linear(1, 1)
    nn.init.zeros_(net.weight)
    assert of(net, "input_norm", [torch.full((4, 1), 1e30)])["weight"].item() == pytest.approx(2e30)


def test_a_layer_that_is_used_twice_adds_up() -> None:
    layer = nn.Linear(2, 2, bias=False)
    nn.init.eye_(layer.weight)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    data = [torch.tensor([[3.0, -4.0]])]
    assert of(net, "input_norm", data)["0.weight"].tolist() == [[math.sqrt(18), 4.0]]
    assert of(net, "macs", data)["0.weight"].item() == 8
    # -4 is cut to 0 behind the first use, and the second use puts out (3, 0).
    assert of(net, "output", data)["0.weight"].tolist() == [3.0, 0.0]


def test_a_weight_is_found_in_a_functional_call() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.ones(2, 1, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(F.conv2d(x, self.kernel, padding=0))

    data = [torch.tensor([[[[1.0, -1.0]]]])]
    assert of(Own(), "input_norm", data)["kernel"].item() == pytest.approx(math.sqrt(2))
    assert of(Own(), "zeros", data)["kernel"].tolist() == [0.5, 0.5]


class Attention(nn.Module):
    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **more)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attention(q, k, v)[0]


@pytest.mark.parametrize("widths", [{}, {"kdim": 3, "vdim": 5}])
def test_inputs_of_attention(widths: dict[str, int]) -> None:
    torch.manual_seed(0)
    net = Attention(**widths)
    sizes = (4, widths.get("kdim", 4), widths.get("vdim", 4))
    q, k, v = (torch.randn(2, 3, size) for size in sizes)
    got = of(net, "input_norm", [((q, k, v), None)])
    norms = [one.reshape(-1, one.shape[-1]).norm(dim=0) for one in (q, k, v)]
    if widths:
        for letter, one in zip("qkv", norms, strict=True):
            close(got[f"attention.{letter}_proj_weight"], one[None])
    else:
        expected = torch.cat([one.expand(4, 4) for one in norms])
        close(got["attention.in_proj_weight"], expected)
        assert of(net, "gram", [((q, k, v), None)])["attention.in_proj_weight"].shape == (3, 4, 4)
        macs = of(net, "macs", [((q, k, v), None)])
        assert macs["attention.in_proj_weight"] == 3 * 4 * 12
    # The projection's inputs, from its outputs: it is square.
    out = net.attention.out_proj
    with torch.no_grad():
        inputs = torch.linalg.solve(out.weight, (net(q, k, v) - out.bias).reshape(-1, 4).T).T
    close(got["attention.out_proj.weight"], inputs.norm(dim=0)[None], 1e-3)


def test_an_encoder_is_measured_without_its_fast_path() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 2)
    names = set(weights_of(net))
    assert set(of(net, "input_norm", [torch.randn(2, 3, 8)])) == names
    zeros = of(net, "zeros", [torch.randn(2, 3, 8)], weights=["layers.0.linear1.weight"])
    assert 0.1 < zeros["layers.0.linear1.weight"].mean() < 0.9


def test_macs_of_linear_convolution_and_transposed_convolution() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=2),
        nn.ConvTranspose2d(8, 2, 2, stride=2),
        nn.Flatten(2),
        nn.Linear(36, 5),
    )
    got = of(net, "macs", [torch.randn(7, 4, 6, 6)])
    assert got["0.weight"] == 8 * 2 * 9 * 3 * 3
    assert got["1.weight"] == 8 * 2 * 4 * 3 * 3
    assert got["3.weight"] == 2 * 36 * 5


def test_a_lookup_multiplies_nothing_and_an_unknown_reader_is_refused() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cell, self.head = nn.Embedding(9, 3), nn.GRU(3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.cell(self.embed(x))[0])

    net, data = Tagger(), [torch.zeros(5, 1, dtype=torch.long)]
    assert of(net, "macs", data, weights=["embed.weight"])["embed.weight"] == 0
    # Five steps through the gates of the cell, and through the head.
    found = of(net, "macs", data)
    per_example = {"cell.weight_ih_l0": 12 * 3, "cell.weight_hh_l0": 12 * 4, "head.weight": 2 * 4}
    examples = len(data[0])
    assert {n: float(found[n]) * examples for n in per_example} == {
        n: 5 * m for n, m in per_example.items()
    }
    with pytest.raises(Unsupported, match="input_norm: embed.weight: .*read by embedding"):
        of(net, "input_norm", data)


# --- outputs -----------------------------------------------------------------------------------


class Functional(nn.Module):
    """A block whose norm, activation and shortcut are written in its forward."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.norm(self.conv(x))) * 2.0


@pytest.mark.parametrize(
    "act", [F.relu, F.relu_, torch.relu, lambda x: x.clamp(min=0), nn.ReLU(True)]
)
def test_zeros_are_those_after_norm_and_activation_however_it_is_written(act: Any) -> None:
    torch.manual_seed(0)
    net = Functional(act)
    nn.init.uniform_(net.norm.bias, -1, 1)
    nn.init.uniform_(net.norm.running_mean, -1, 1)
    data = [torch.randn(4, 2, 3, 3), torch.randn(2, 2, 3, 3)]
    with torch.no_grad():
        net.eval()
        out = torch.cat([F.relu(net.norm(net.conv(x))) for x in data])
        net.train()
    found = measure(
        net, {"zeros", "output", "deviation"}, ["conv.weight"], data=data, progress=False
    )
    close(found["zeros"]["conv.weight"], (out == 0).double().mean((0, 2, 3)))
    close(found["output"]["conv.weight"], out.abs().mean((0, 2, 3)))
    close(found["deviation"]["conv.weight"], out.std((0, 2, 3), correction=0))


def test_without_an_activation_the_outputs_themselves_count() -> None:
    net = nn.Linear(1, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [-2.0]]))
        net.bias.zero_()
    data = [torch.tensor([[0.0], [1.0], [3.0]])]
    assert of(net, "output", data)["weight"].tolist() == [4 / 3, 8 / 3]
    assert of(net, "zeros", data)["weight"].tolist() == [1 / 3, 1 / 3]


def test_a_shortcut_ends_the_trail_even_in_place() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(1, 1, bias=False)
            nn.init.ones_(self.line.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.line(x)
            out += 10.0
            return F.relu(out)

    data = [torch.tensor([[-1.0], [3.0]])]
    assert of(Block(), "output", data)["line.weight"].tolist() == [2.0]
    assert of(Block(), "zeros", data)["line.weight"].tolist() == [0.0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from([0.0, 1e6]))
def test_deviation_does_not_depend_on_how_data_is_cut(sizes: list[int], offset: float) -> None:
    torch.manual_seed(sum(sizes))
    layer = nn.Linear(2, 3).double()
    batches = [torch.randn(size, 2).double() + offset for size in sizes]
    whole = of(layer, "deviation", [torch.cat(batches)])["weight"]
    close(of(layer, "deviation", batches)["weight"], whole, 1e-7)
    with torch.no_grad():
        close(whole, layer(torch.cat(batches)).std(0, correction=0), 1e-7)


def test_gate_is_the_scale_of_the_norm_that_follows() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.Dropout(), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 4, 1)
    )
    net.append(nn.GroupNorm(2, 4))
    nn.init.uniform_(net[2].weight)
    nn.init.uniform_(net[5].weight)
    got = of(net, "gate", [torch.randn(2, 1, 3, 3)])
    assert torch.equal(got["0.weight"], net[2].weight.detach())
    assert torch.equal(got["4.weight"], net[5].weight.detach())
    got["0.weight"].zero_()
    assert net[2].weight.all()


@pytest.mark.parametrize(
    "tail",
    [
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2)),
        nn.BatchNorm2d(2, affine=False),
        nn.LayerNorm((2, 3, 3)),
        nn.Identity(),
    ],
)
def test_gate_refuses_a_layer_that_no_scale_per_unit_follows(tail: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), tail)
    with pytest.raises(Unsupported, match="gate: 0.weight"):
        of(net, "gate", [torch.randn(2, 1, 3, 3)], weights=["0.weight"])


def test_following_names_layers_and_norms() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(18, 4)
    )
    net.append(nn.LayerNorm(4))
    assert following(net, [torch.zeros(2, 1, 3, 3)]) == {"0": "1", "4": "5"}


def test_following_leaves_out_a_layer_with_two_norms() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.one, self.two = nn.Linear(2, 2), nn.LayerNorm(2), nn.LayerNorm(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(self.line(x)) + self.two(self.line(x))

    assert following(Twice(), [torch.zeros(2, 2)]) == {}
    with pytest.raises(Unsupported, match="one.weight, two.weight"):
        of(Twice(), "gate", [torch.zeros(2, 2)], weights=["line.weight"])


# --- nothing is left behind --------------------------------------------------------------------


def mixed() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Dropout(), nn.Flatten()
    )
    net.append(nn.Linear(16, 3))
    net[0].weight.requires_grad_(False)
    net[5].weight.grad = torch.ones_like(net[5].weight)
    net[3].eval()
    with torch.no_grad():
        net[5].weight[0, 0] = -0.0
    return net


def state_of(net: nn.Module) -> Any:
    return (
        [(name, one.training) for name, one in net.named_modules()],
        [getattr(one, "track_running_stats", None) for one in net.modules()],
        {
            name: (one.dtype, one.detach().numpy().tobytes())
            for name, one in net.state_dict().items()
        },
        [
            (one.requires_grad, None if one.grad is None else one.grad.tolist())
            for one in net.parameters()
        ],
        [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in net.modules()],
        torch.random.get_rng_state().tolist(),
        torch.is_grad_enabled(),
    )


IMAGES = [
    (torch.ones(2, 2, 4, 4), torch.tensor([0, 1])),
    (torch.zeros(2, 2, 4, 4), torch.tensor([2, 1])),
]


@pytest.mark.parametrize("fresh", [True, False])
def test_the_network_and_the_process_are_as_before(fresh: bool) -> None:
    net = mixed()
    if not fresh:
        nn.init.ones_(net[1].running_mean)
    before = state_of(net)
    needs = MEASURED - {"gate"}
    found = measure(net, needs, weights_of(net), data=IMAGES, loss=F.cross_entropy, progress=False)
    assert state_of(net) == before
    for fact, ones in found.items():
        assert set(ones) == {"0.weight", "5.weight"}, fact
        assert not any(one.requires_grad for one in ones.values())


@pytest.mark.parametrize("fact", sorted(MEASURED))
def test_after_an_error_too(fact: str) -> None:
    class Bad(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError

    net = mixed().append(Bad())
    before = state_of(net)
    with pytest.raises(ZeroDivisionError):
        of(net, fact, IMAGES, F.cross_entropy)
    assert state_of(net) == before


def test_hooks_on_parameters_do_not_run() -> None:
    net, seen = small(), []
    net[0].weight.register_hook(lambda gradient: seen.append(1))
    of(net, "gradient", pairs(), MSE)
    assert seen == []


def test_dropout_is_off_and_used_statistics_are_used() -> None:
    net = nn.Sequential(nn.Dropout(0.9), nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1)).train()
    net[2].running_mean.fill_(3.0)
    nn.init.ones_(net[1].weight)
    data = [(torch.tensor([[1.0, 1.0]]), None)]
    assert of(net, "input_norm", data)["1.weight"].tolist() == [[1.0, 1.0]]
    got = of(net, "output", data)["1.weight"].item()
    assert got == pytest.approx(1.0, abs=1e-4)


def test_statistics_that_were_never_estimated_are_taken_from_the_batch() -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, eps=1e-12))
    nn.init.ones_(net[0].weight)
    data = [torch.tensor([[10.0], [14.0]])]
    assert of(net, "output", data)["0.weight"].item() == pytest.approx(1.0)
    assert net[1].num_batches_tracked == 0
    # Flow is defined for the network in eval mode.
    flow = measure(net, {"flow"}, ["0.weight"], data=data, progress=False)["flow"]
    assert flow["0.weight"].tolist() == [[1.0]]


def test_the_same_seed_gives_the_same_facts() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + torch.randn_like(x))

    net, data = Noisy(3, 2), [torch.zeros(4, 3)]
    one, again, other = (of(net, "input_norm", data, seed=s)["weight"] for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_under_inference_mode_and_in_wrappers() -> None:
    net, data = small(), pairs()
    expected = of(net, "gradient", data, MSE)["0.weight"]
    with torch.inference_mode():
        assert torch.equal(of(net, "gradient", data, MSE)["0.weight"], expected)
    wrapped = nn.DataParallel(net)
    assert torch.equal(
        of(wrapped, "gradient", data, MSE, weights=["0.weight"])["0.weight"], expected
    )
    parts = nn.Sequential(torch.compile(net, backend="eager"), nn.Identity())
    name = "0._orig_mod.0.weight"
    assert torch.equal(of(parts, "gradient", data, MSE, weights=[name])[name], expected)
    norms = of(parts, "input_norm", data, weights=[name])[name]
    assert torch.equal(norms, of(net, "input_norm", data)["0.weight"])


# --- data and errors ---------------------------------------------------------------------------


def test_a_generator_serves_one_pass_and_several_facts_share_it() -> None:
    def stream() -> Iterator[Any]:
        yield from pairs()

    net = small()
    needs = {"gradient", "input_norm", "zeros", "flow", "macs"}
    got = measure(net, needs, weights_of(net), data=stream(), loss=MSE, progress=False)
    again = measure(net, needs, weights_of(net), data=pairs(), loss=MSE, progress=False)
    assert all(torch.equal(got[f][n], again[f][n]) for f in needs for n in weights_of(net))
    with pytest.raises(Unsupported, match="twice.*generator"):
        of(net, "hessian_gradient", stream(), MSE)


def test_keywords_and_arrays_are_inputs_too() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(2, 1)

        def forward(self, x: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
            return {"out": self.line(x * scale)}

    x = torch.tensor([[3.0, 4.0]])
    data = [{"x": x.numpy(), "scale": 2.0}]
    assert of(Named(), "input_norm", data)["line.weight"].tolist() == [[6.0, 8.0]]
    loss = lambda out, target: out["out"].sum() * target  # noqa: E731
    got = of(Named(), "gradient", [(data[0], 5.0)], loss)
    assert got["line.weight"].tolist() == [[30.0, 40.0]]
    assert of(Named(), "flow", data)["line.weight"].tolist() == [[1.0, 1.0]]


X, Y = torch.ones(2, 3), torch.ones(2, 2)

BAD: dict[str, tuple[type[KarikomiError], str, dict[str, Any]]] = {
    "no data": (InvalidArgument, "gradient, measured on data; pass data=", {"data": None}),
    "no loss": (InvalidArgument, "pass loss=", {"loss": None}),
    "empty": (InvalidArgument, "no batches", {"data": iter([])}),
    "no targets": (InvalidArgument, "targets", {"data": [X]}),
    "a tensor": (InvalidArgument, "iterable of batches", {"data": X}),
    "two tensors of one form": (InvalidArgument, "iterable of batches", {"data": (X, X + 1)}),
    "a number": (InvalidArgument, "iterable of batches", {"data": 3}),
    "a triple": (InvalidArgument, "pair", {"data": [(X, X, Y)]}),
    "a vector for a loss": (InvalidArgument, "one number", {"loss": lambda o, t: o}),
    "no tensor for a loss": (InvalidArgument, "float", {"loss": lambda o, t: 1.0}),
    "a loss of NaN": (NonFinite, "loss", {"loss": lambda o, t: o.sum() * math.nan}),
    "a loss apart": (Unsupported, "depends on none", {"loss": lambda o, t: o.detach().sum()}),
    "an unknown fact": (InvalidArgument, "'noise'", {"needs": {"noise"}}),
    "a fact of training": (InvalidArgument, "'moved'.*attach", {"needs": {"moved"}}),
    "an unknown weight": (UnknownName, "did you mean '0.weight'", {"weights": ["0.weigth"]}),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_missing_or_wrong_is_named(case: str) -> None:
    error, text, change = BAD[case]
    given = {"needs": {"gradient"}, "weights": ["0.weight"], "data": [(X, Y)], "loss": MSE}
    given |= change
    needs, weights = given.pop("needs"), given.pop("weights")
    with pytest.raises(error, match=text) as caught:
        measure(small().float(), needs, weights, progress=False, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fact", sorted(MEASURED - {"macs", "gate", "flow"}))
def test_facts_that_are_no_numbers_name_the_weight(fact: str) -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Sigmoid())
    x = torch.tensor([[math.nan]])
    if fact == "zeros":
        # NaN is no zero, and a share of zeros is always a number.
        assert of(net, fact, [x])["0.weight"].tolist() == [0.0]
        return
    with pytest.raises(NonFinite, match=r"0\.weight|loss"):
        of(net, fact, [(x, x)], MSE)


def test_what_a_weight_of_nan_spoils_is_named() -> None:
    net = small().float()
    net[2].weight.data.fill_(math.nan)
    with pytest.raises(NonFinite, match="0.weight: the measured flow"):
        of(net, "flow", [X], weights=["0.weight"])


def test_nothing_to_measure_is_nothing() -> None:
    assert measure(small(), (), ["0.weight"], data=None) == {}
    assert measure(small(), {"gradient"}, [], data=None) == {"gradient": {}}


def test_progress_is_shown_on_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    measure(small(), {"gradient"}, ["0.weight"], data=pairs(), loss=MSE, progress=True)
    assert capsys.readouterr() == ("", "")
