"""Weights of shape (inputs, units), as those of GPT-2 in transformers: the results are those of Linear layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.pytorch_utils import Conv1D  # noqa: E402

import karikomi as kk  # noqa: E402
from karikomi.torch.facts.measure import measure  # noqa: E402
from karikomi.torch.tracing.weight_reads import WeightReadHooks  # noqa: E402


class Net(torch.nn.Module):
    """Two layers, either (units, inputs) or (inputs, units)."""

    def __init__(self, make: Callable[[int, int], Any]) -> None:
        super().__init__()
        self.first, self.last = make(6, 10), make(10, 4)

    def forward(self, inputs: Any) -> Any:
        return self.last(torch.relu(self.first(inputs)))


@pytest.fixture
def pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = Net(torch.nn.Linear)
    turned = Net(lambda inputs, units: Conv1D(units, inputs))
    with torch.no_grad():
        for name in ("first", "last"):
            one, other = getattr(plain, name), getattr(turned, name)
            other.weight.copy_(one.weight.T)
            other.bias.copy_(one.bias)
    return plain, turned


INPUTS = torch.randn(40, 3, 6, generator=torch.Generator().manual_seed(1))
DATA = [(INPUTS, INPUTS[..., :4].sin())]
STEPS: dict[str, Callable[[Any], Any]] = {
    "wanda": lambda net: kk.torch.prune_(net, 0.5, score="wanda", data=DATA),
    "sparsegpt": lambda net: kk.torch.prune_(net, 0.5, score="sparsegpt", data=DATA),
    "obc": lambda net: kk.torch.prune_(net, 0.5, score="obc", data=DATA),
    "units": lambda net: kk.torch.prune_(net, 0.5, pattern="units"),
    "units by outputs": lambda net: kk.torch.prune_(
        net, 0.5, pattern="units", score="activation", data=DATA, only="first*"
    ),
    "gptq": lambda net: kk.torch.quantize_(net, bits=3, method="gptq", data=DATA, progress=False),
    "rate": lambda net: kk.torch.quantize_(
        net, rate=2.5, method="cerwu", data=DATA, progress=False
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_the_result_is_that_of_linear_layers(pair: tuple[Any, Any], step: str) -> None:
    before = copy.deepcopy(pair[0])
    for net in pair:
        STEPS[step](net)
    for name in ("first", "last"):
        one, other = (getattr(net, name) for net in pair)
        assert torch.equal(one.weight, other.weight.T), name
    assert not torch.equal(before.first.weight, pair[0].first.weight)


def test_facts_of_products_in_a_users_forward_are_in_the_layout_of_the_weight() -> None:
    class Written(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(6, 2))
            self.other = torch.nn.Parameter(torch.randn(3, 6))

        def forward(self, inputs: Any) -> Any:
            return inputs @ self.weight + torch.addmm(inputs[0, :, :2], inputs[0], self.weight)

    module = Written()
    found = measure(module, {"input_norm", "macs"}, ["weight"], data=[INPUTS])
    both = torch.cat([INPUTS.flatten(0, 1), INPUTS[0]]).double()
    assert torch.allclose(found["input_norm"]["weight"], both.norm(dim=0)[:, None])
    assert float(found["macs"]["weight"]) == pytest.approx((120 + 3) * 12 / 40)


def test_a_weight_on_the_left_and_a_scaled_product_are_other_readings() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 6))
    readings: list[Any] = []
    with torch.no_grad(), WeightReadHooks({"w": weight}, [readings.append]) as watch:
        weight @ INPUTS[0].T
        torch.addmm(torch.zeros(3, 6), torch.eye(3), weight, alpha=2.0)
    assert not readings and "w" in watch.strays
