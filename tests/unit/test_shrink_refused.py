"""What cannot be shrunk is frozen or refused, with the operator, its place and what to do; nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.torch.quantization.in_place import quantize_
from karikomi.torch.shrinking.smaller_copy import shrink
from shrink_networks import Forward


def kill(layer: nn.Linear, *units: int) -> None:
    with torch.no_grad():
        layer.weight[list(units)] = 0.0
        layer.bias[list(units)] = 0.0


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for pair in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(*pair), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Here(Forward):
    """Its forward is in this file, so that this is the place of its operators."""

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.written(self, *inputs)


def wrapped(forward: Callable[..., Any]) -> Forward:
    torch.manual_seed(0)
    mask = torch.arange(8) < 4
    return Here(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 6), mask=mask)


@pytest.mark.parametrize(
    ("forward", "operator"),
    [
        (lambda m, x: m.c(m.a(x).roll(1, -1)), "roll"),
        (lambda m, x: m.c(m.a(x).cumsum(-1)), "cumsum"),
        (lambda m, x: m.c(m.a(x).topk(8, -1).values), "topk"),
        (lambda m, x: m.c(torch.fft.fft(m.a(x)).real), "fft_fft"),
        (lambda m, x: m.c(F.max_pool1d(m.a(x), 3, 1, 1)), "max_pool1d"),
        (lambda m, x: m.c(F.conv1d(m.a(x)[:, None], x[:1, None, :3], padding=1)[:, 0]), "conv1d"),
        (lambda m, x: m.c(torch.einsum("biij->b", m.a(x).view(6, 2, 2, 2))[:, None] + x.repeat(1, 2)[:, :8]), "einsum"),
        (lambda m, x: m.c(torch.cond(x.sum() > 0, torch.sin, torch.cos, (m.a(x),))), "cond"),
        (lambda m, x: m.c(torch.cat([torch.linalg.qr(m.a(x)).Q, x[:, :2]], 1)), "linalg_qr"),
    ],
)  # fmt: skip
def test_units_stay_that_an_operator_cannot_lose(
    forward: Callable[..., Any], operator: str
) -> None:
    net = wrapped(forward)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(Unsupported, match="no unit can go; got a: ") as caught:
        shrink(net, torch.randn(6, 6), width=0.5, only="a.*")
    assert f"{operator} at {__file__}:" in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_rest_shrinks_and_the_report_names_what_stayed() -> None:
    net = wrapped(lambda m, x: m.c(m.b(torch.linalg.qr(m.a(x)).Q @ torch.ones(6, 8)).relu()))
    small, report = shrink(net, torch.randn(6, 6), width=0.5)
    assert report.widths_after == {"a": 8, "b": 4, "c": 6}
    (place,) = [where for where in report.frozen if where.startswith("linalg_qr at ")]
    assert report.frozen[place] == "there is no rule for this operator"
    assert report.frozen["a"] == f"there is no rule for this operator: {place}"
    assert report.frozen["c"] == "its units are outputs of the network"


def test_operators_of_layers_of_torch_are_named_by_their_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LocalResponseNorm(3), nn.Conv2d(8, 5, 1))
    with pytest.raises(Unsupported, match="0: avg_pool3d in 1; 2: its units are outputs"):
        shrink(net, torch.randn(2, 3, 4, 4), width=0.5)


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (lambda m, x: m.c(m.a(x)) if x.sum() > 0 else m.c(-m.a(x)), "data-dependent"),
        (lambda m, x: m.c(m.a(x))[: int(x.abs().sum())], "data-dependent"),
    ],
)
def test_control_flow_that_depends_on_data_is_refused_with_its_line(
    forward: Callable[..., Any], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Unsupported, match="torch.export does not take the module") as caught:
        shrink(wrapped(forward), torch.ones(6, 6), width=0.5)
    assert capfd.readouterr().err == ""
    message = str(caught.value)
    assert (
        says in message and f"at {__file__}:" in message and "torch.where or torch.cond" in message
    )


@pytest.mark.parametrize(
    ("forward", "operator"),
    [
        (lambda m, x: m.c(m.a(x)[x[:, 0] > 0]), "index"),
        (lambda m, x: m.c(m.b(m.a(x))) + m.b(m.a(x))[:, m.mask].sum(), "index"),
        (lambda m, x: m.c(m.a(x)) + x.nonzero().sum(), "nonzero"),
    ],
)
def test_shapes_that_depend_on_data_are_refused_with_their_line(
    forward: Callable[..., Any], operator: str
) -> None:
    with pytest.raises(Unsupported, match="shape of a result depends on the data") as caught:
        shrink(wrapped(forward), torch.ones(6, 6), width=0.5)
    assert f"got {operator} at {__file__}:" in str(caught.value)
    assert "pick a fixed number of entries" in str(caught.value)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_modules_that_have_no_weights_to_cut_are_refused_with_what_to_do() -> None:
    coded = mlp(4, 9, 3)
    quantize_(coded, bits=8)
    with pytest.raises(Unsupported, match="weights are quantized.*shrink before quantize_"):
        shrink(coded, torch.randn(2, 4), width=0.5)
    with pytest.raises(Unsupported, match="scripted module.*shrink the module that was scripted"):
        shrink(torch.jit.script(mlp(4, 9, 3)), torch.randn(2, 4), width=0.5)
    with torch.device("meta"):
        empty = mlp(4, 9, 3)
    with pytest.raises(Unsupported, match="0.weight: a tensor on the meta device.*fill the module"):
        shrink(empty, torch.randn(2, 4), width=0.5)


def test_a_dead_unit_whose_number_the_forward_uses_stays_in_the_graph_form() -> None:
    net = wrapped(lambda m, x: m.c(F.relu(m.a(x)) / m.a(x).size(1)))
    kill(net.a, 1)
    small, report = shrink(net, torch.randn(6, 6))
    assert report.widths_after["a"] == 7 and report.form == "graph"
    x = torch.randn(3, 6)
    torch.testing.assert_close(small(x), net(x))


def test_a_number_of_outputs_that_is_a_width_stays() -> None:
    net = wrapped(lambda m, x: m.c(m.a(x)).repeat(1, m.a(x).size(1)))
    kill(net.a, 1)
    small, report = shrink(net, torch.randn(6, 6))
    assert report.widths_after["a"] == 7 and small(torch.randn(6, 6)).shape == (6, 48)


def test_an_entry_that_the_forward_names_stays_and_the_others_go() -> None:
    net = wrapped(lambda m, x: m.c(F.relu(m.a(x))) + m.a.bias[7])
    kill(net.a, 1)
    small, report = shrink(net, torch.randn(6, 6))
    assert report.widths_after["a"] == 7 and report.form == "graph"
    x = torch.randn(6, 6)
    torch.testing.assert_close(small(x), net(x))


def test_units_that_an_embedding_also_feeds_are_not_dead() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.f, self.o = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            h = self.e(tokens)
            return self.o(h + F.relu(self.f(h)))

    net = Stream()
    kill(net.f, 2, 3)
    # One token: its embedding looks like a constant.
    small, report = shrink(net, torch.zeros(1, 1, dtype=torch.int64))
    assert report.removed == 0
    torch.testing.assert_close(small(torch.arange(9)), net(torch.arange(9)))


@pytest.mark.parametrize("training", [True, False])
def test_masks_that_a_hook_applies_are_followed(training: bool) -> None:
    net = mlp(4, 9, 3).requires_grad_(training)
    prune.ln_structured(net[0], "weight", 4, n=2, dim=0)
    with torch.no_grad():
        net[0].bias[(net[0].weight_mask == 0).all(1)] = 0.5
    x = torch.randn(5, 4)
    small, report = shrink(net, x[:2])
    assert report.widths_after == {"0": 5, "2": 3} and small[0].out_features == 5
    torch.testing.assert_close(small(x), net(x))
    # The mask goes on working.
    assert small[0].weight_mask.shape == small[0].weight_orig.shape == (5, 4)
    half, _ = shrink(net, x[:2], width=0.5)
    assert half[0].weight_orig.shape == (5, 4) and half[2].in_features == 5


def test_parametrized_layers_are_followed() -> None:
    net = mlp(4, 9, 9, 3)
    parametrize.register_parametrization(net[0], "weight", nn.Tanh())
    with torch.no_grad():
        net[0].parametrizations.weight.original[2:5] = 0.0
        net[0].bias[2:5] = 0.0
    x = torch.randn(5, 4)
    small, report = shrink(net, x)
    assert small[0].out_features == small[2].in_features == 6 == report.widths_after["0"]
    torch.testing.assert_close(small(x), net(x))


def test_buffers_that_a_forward_writes_to_are_left_as_they_were() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("mean", torch.ones(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            self.calls += 1
            self.mean.mul_(0.9).add_(h.mean(0) * 0.1)
            return self.b(h - self.mean)

    net = Counting().eval()
    small, report = shrink(net, torch.randn(2, 4), width=0.5)
    assert report.parameters_after == 4 * 5 + 4 * 2 + 2
    assert net.calls == small.calls == 0 and torch.equal(small.mean, torch.ones(4))
    graph, _ = shrink(Forward(lambda m, x: m.n(x.view(-1, 4)), n=net), torch.randn(2, 4), width=0.5)
    assert graph.n.calls == 0


def test_inputs_that_do_not_fit_are_the_callers_mistake() -> None:
    with pytest.raises(InvalidArgument, match="example inputs"):
        shrink(mlp(4, 9, 3), torch.randn(2, 5))


def test_targets_that_are_none() -> None:
    net, x = mlp(4, 9, 3), torch.randn(2, 4)
    wrongs = [
        {"width": 0.0},
        {"width": 1.5},
        {"heads": 2},
        {"macs": -1},
        {"ms": True},
        {"ms": -1.0},
    ]
    wrongs += [
        {"macs": 1.5},
        {"parameters": 20.0},
        {"bytes": float("inf")},
        {"width": float("nan")},
    ]
    for wrong in wrongs:
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            shrink(net, x, **wrong)
    with pytest.raises(InvalidArgument, match="one target is to be given; got width=0.5, macs=0.5"):
        shrink(net, x, width=0.5, macs=0.5)
    with pytest.raises(InvalidArgument, match="no choice of units is as small.*at least"):
        shrink(net, x, parameters=5)
    with pytest.raises(LookupError, match="unknown allocation"):
        shrink(net, x, width=0.5, allocation="globl")
    for limit in ({"multiple_of": 0}, {"least": 0}, {"multiple_of": 1.5}, {"least": True}):
        with pytest.raises(InvalidArgument, match=f"{next(iter(limit))}.*whole number >= 1"):
            shrink(net, x, width=0.5, **limit)


def test_a_mask_whose_entries_torch_compares_is_refused_with_the_way_round() -> None:
    class Masked(nn.Module):
        def __init__(self, causal: bool | None) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder, self.causal = nn.TransformerEncoder(layer, 1), causal

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.encoder(x, mask=mask, is_causal=self.causal)

    x = torch.randn(2, 5, 8)
    with pytest.raises(Unsupported, match=r"test_shrink_refused.py:\d+; pass is_causal= "):
        shrink(Masked(None), x, width=0.5)
    assert shrink(Masked(True), x, width=0.5)[1].widths_after["encoder.layers.0.linear1"] == 8
