"""What is no chain, or would compute something else, is refused by name, and nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

from karikomi.errors import InvalidArgument, Unsupported
from karikomi.torch.shrinking.smaller_copy import shrink


def kill(layer: nn.Linear, unit: int) -> None:
    with torch.no_grad():
        layer.weight[unit] = 0.0
        layer.bias[unit] = 0.0


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False)))


class Wrapped(nn.Module):
    """An MLP whose forward is given as a function of (self, x)."""

    def __init__(self, forward: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.own = nn.LayerNorm(6), nn.Parameter(torch.ones(6))
        self.twin = nn.Linear(6, 6)
        self.grouped, self._forward = nn.Conv1d(6, 6, 1, groups=2), forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


def _shared(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return net.c(net.twin(net.a(x)))


@pytest.mark.parametrize(
    ("forward", "says"),
    [
        (lambda m, x: m.c(m.a(x) + m.b(m.a(x))), "Linear 'a' is called twice"),
        (lambda m, x: m.c((h := m.a(x)) + m.b(h)), "add joins the branches a and b"),
        (lambda m, x: m.c(torch.cat([m.a(x), m.b(x)])), "cat joins the branches"),
        (lambda m, x: m.c(m.b(h := m.a(x))) + h, "add and b both read a"),
        (lambda m, x: m.c(m.norm(m.a(x))), "LayerNorm 'norm' is not known"),
        (lambda m, x: m.c(torch.softmax(m.a(x), -1)), "softmax is not known"),
        (lambda m, x: m.c(m.a(x).roll(1)), "roll is not known"),
        (lambda m, x: m.c(m.a(x) * m.own), "mul takes a second tensor"),
        (lambda m, x: m.c(m.grouped(m.a(x))), "Conv1d 'grouped' is not known"),
        (lambda m, x: m.c(m.a(x).view(-1, 2, 3).view(-1, 6).t().t()), "t is not known"),
        (lambda m, x: m.c(F.max_pool1d(m.a(x), 3, 1, 1)), "max_pool1d pools over units"),
        (lambda m, x: m.a(x) if x.sum() > 0 else x, "cannot be traced"),
        (lambda m, x: F.relu(x), "no Linear or Conv layer"),
        (_shared, "Linear 'twin' shares its weight"),
    ],
)
def test_what_is_no_chain_is_refused_by_name(
    forward: Callable[[nn.Module, torch.Tensor], torch.Tensor], says: str
) -> None:
    net = Wrapped(forward)
    net.c.weight = net.twin.weight if forward is _shared else net.c.weight
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(Unsupported, match=says) as caught:
        shrink(net, torch.randn(6, 6))
    assert "\n" not in str(caught.value)
    assert "no Linear" in says or f"at {__file__}:" in str(caught.value)
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())


def test_a_mixture_of_units_is_refused() -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(Unsupported, match="Linear '2' reads units of several places at once"):
        shrink(net, torch.randn(2, 3, 5))


def test_masks_that_a_hook_applies_are_refused_until_permanent() -> None:
    net = mlp(4, 9, 3)
    prune.l1_unstructured(net[0], "weight", 0.9)
    with pytest.raises(Unsupported, match="cannot be copied.*make weights that a hook computes"):
        shrink(net, torch.randn(2, 4))
    net.requires_grad_(False)(torch.randn(2, 4))  # now the computed weight can be copied
    with pytest.raises(Unsupported, match="'0' has a weight that a hook computes"):
        shrink(net, torch.randn(2, 4))
    prune.remove(net[0], "weight")
    assert shrink(net, torch.randn(2, 4))[1].removed > 0


def test_a_parametrized_layer_is_refused() -> None:
    net = mlp(4, 9, 9, 3)
    parametrize.register_parametrization(net[1], "weight", nn.Identity())
    with pytest.raises(Unsupported, match="Parametrized"):
        shrink(net, torch.randn(2, 4))


def test_a_change_of_what_is_computed_is_refused() -> None:
    class Sly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.a(x))
            return self.b(x / x.size(1))  # its width is a number of the forward

    net = Sly()
    kill(net.a, 1)
    with pytest.raises(
        Unsupported, match="smaller network would differ; got a relative difference of"
    ):
        shrink(net, torch.randn(2, 4))


def test_an_output_whose_shape_is_a_width_is_refused() -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.b(x).repeat(1, x.size(1))

    net = Shaped()
    kill(net.a, 1)
    with pytest.raises(Unsupported, match="the shape of an output would change"):
        shrink(net, torch.randn(2, 4))


def test_a_smaller_network_that_does_not_run_is_refused() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.relu(self.a(x))) + self.a.bias[7]

    net = Written()
    kill(net.a, 1)
    with pytest.raises(Unsupported, match="does not run with these widths; got index 7"):
        shrink(net, torch.randn(2, 4))


def test_inputs_that_do_not_fit_are_the_callers_mistake() -> None:
    with pytest.raises(InvalidArgument, match="example inputs"):
        shrink(mlp(4, 9, 3), torch.randn(2, 5))
