"""Compensation of a shrink: what is left is the least-squares fit to the dense network, kept only where it helps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from karikomi.errors import InvalidArgument, NonFinite
from karikomi.reconstruction.affine_fit import DAMPING
from karikomi.shrink import refit_outcome
from karikomi.torch.compensation.refits import Sums
from karikomi.torch.shrinking.smaller_copy import shrink
from karikomi.torch.tracing.weight_reads import Reading


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def batches(*shape: int, count: int = 5) -> list[torch.Tensor]:
    """Return batches, of which the fifth is held out."""
    return [torch.randn(*shape) for _ in range(count)]


def ridge(
    inputs: np.ndarray, targets: np.ndarray, start: np.ndarray, damping: float = DAMPING
) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and constants of the damped regression, by `numpy.linalg.lstsq` on a system with more rows."""
    x, y = inputs - inputs.mean(0), targets - targets.mean(0)
    added = np.sqrt(damping * np.mean(np.sum(x * x, axis=0))) * np.eye(x.shape[1])
    rows = np.concatenate([x, added]), np.concatenate([y, added @ start.T])
    weights = np.linalg.lstsq(*rows, rcond=None)[0].T
    return weights, targets.mean(0) - weights @ inputs.mean(0)


def copies() -> nn.Sequential:
    """Return a network of which two of four hidden units are half of the others, so that these can take their place."""
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        for part in (net[0].weight, net[0].bias):
            part[2:] = 0.5 * part[:2]
    return net


def distance(net: nn.Module, small: nn.Module, *inputs: Any) -> float:
    """Return the relative distance of outputs in evaluation mode."""
    with torch.no_grad():
        expected, got = (copy.deepcopy(one).eval()(*inputs) for one in (net, small))
    return float((expected - got).norm() / expected.norm())


def test_the_reader_is_the_damped_regression_on_what_is_left() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    data = batches(16, 3)
    small, report = shrink(net, data[0], width=0.5, data=data)
    plain, _ = shrink(net, data[0], width=0.5)
    with torch.no_grad():
        x = torch.cat(data[:4])
        left, outputs = small[:2](x).double().numpy(), net(x).double().numpy()
    weights, constants = ridge(left, outputs, plain[2].weight.detach().double().numpy())
    np.testing.assert_allclose(small[2].weight.detach().numpy(), weights, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(small[2].bias.detach().numpy(), constants, rtol=1e-4, atol=1e-5)
    assert torch.equal(small[0].weight, plain[0].weight)
    held = [distance(net, one, data[4]) for one in (plain, small)]
    assert report.compensation["2"].before == pytest.approx(held[0], rel=1e-3)
    assert report.compensation["2"].after == pytest.approx(held[1], rel=1e-3)
    assert report.compensation[""].after == pytest.approx(report.compensation["2"].after, rel=1e-3)


def test_what_can_be_made_of_the_others_is_recovered() -> None:
    net, data = copies(), batches(32, 3)
    small, report = shrink(net, data[0], width=0.5, data=data)
    plain, _ = shrink(net, data[0], width=0.5)
    fresh = torch.randn(50, 3)
    assert distance(net, plain, fresh) > 0.1
    assert distance(net, small, fresh) < 0.03 * distance(net, plain, fresh)
    # The columns of the units that went are added, at half of their scale.
    expected = net[2].weight[:, :2] + 0.5 * net[2].weight[:, 2:]
    torch.testing.assert_close(small[2].weight, expected, rtol=0.05, atol=0.02)
    assert report.compensation["2"].kept and report.compensation[""].kept


class Right(nn.Module):
    """The network of `copies` with its weights on the right of the products, with a bias in the product or none."""

    def __init__(self, *, added: bool) -> None:
        super().__init__()
        net = copies()
        self.one, self.added = net[0], added
        self.weight, self.bias = nn.Parameter(net[2].weight.t().clone()), net[2].bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs."""
        x = torch.relu(self.one(x))
        return torch.addmm(self.bias, x, self.weight) if self.added else x @ self.weight


@pytest.mark.parametrize("added", [True, False])
def test_a_weight_on_the_right_of_a_product(added: bool) -> None:
    net, data = Right(added=added), batches(32, 3)
    small, report = shrink(net, data[0], width=0.5, data=data)
    assert report.compensation["weight"].kept
    plain, _ = shrink(net, data[0], width=0.5)
    fresh = torch.randn(50, 3)
    assert distance(net, small, fresh) < 0.03 * distance(net, plain, fresh)


def test_without_damping_the_fit_is_exact_and_lstsq() -> None:
    x = torch.randn(40, 3, dtype=torch.float64)
    full = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], dtype=torch.float64)
    targets = x @ full.T + torch.tensor([4.0, -1.0], dtype=torch.float64)
    sums = Sums()
    sums.read(Reading(name="w", weight=full, inputs=x, outputs=None), targets)
    found, constants = sums.solved(np.zeros((2, 3)), free=True, damping=1e-12)
    np.testing.assert_allclose(found, full, atol=1e-8)
    np.testing.assert_allclose(constants, [4.0, -1.0], atol=1e-8)
    fixed, none = sums.solved(np.zeros((2, 3)), free=False, damping=1e-12)
    expected = np.linalg.lstsq(x.numpy(), targets.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(fixed, expected, atol=1e-8)
    assert none.tolist() == [0.0, 0.0]
    assert sums.error(found, constants) < 1e-6 < sums.error(fixed, none)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_with_padding_and_stride(groups: int) -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, padding=1, groups=groups)
    )
    data = batches(3, 2, 7, 7)
    small, report = shrink(net, data[0], width=0.5, data=data)
    plain, _ = shrink(net, data[0], width=0.5)
    assert report.compensation["2"].kept
    each, rows = small[2].weight.shape[1], 4 // groups
    with torch.no_grad():
        x = torch.cat(data[:4])
        left = F.unfold(small[:2](x), 3, stride=2, padding=1).transpose(1, 2).flatten(0, 1)
        outputs = net(x).flatten(2).transpose(1, 2).flatten(0, 1)
    for group in range(groups):
        inputs = left[:, group * each * 9 : (group + 1) * each * 9].double().numpy()
        own = slice(group * rows, (group + 1) * rows)
        start = plain[2].weight[own].detach().flatten(1).double().numpy()
        weights, constants = ridge(inputs, outputs[:, own].double().numpy(), start)
        got = small[2].weight[own].detach().flatten(1).numpy()
        np.testing.assert_allclose(got, weights, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(small[2].bias[own].detach().numpy(), constants, atol=1e-4)


def test_a_layer_that_is_worse_on_held_out_data_stays_as_it_was() -> None:
    # Unit 1 is the opposite of unit 0 in the data that is fitted, and the same in the data held out.
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.diag(torch.tensor([1.0, 0.9])))
        net[1].weight.fill_(1.0)
    one = torch.randn(16, 1)
    data = [torch.cat([one, sign * one], 1) for sign in (-1.0, -1.0, -1.0, -1.0, 1.0)]
    small, report = shrink(net, data[0], width=0.5, data=data)
    refit = report.compensation["1"]
    assert not refit.kept and refit.after > refit.before
    assert refit.why == "" and report.compensation[""].after == report.compensation[""].before
    assert small[1].weight.tolist() == [[1.0]]
    assert torch.equal(small[1].bias, net[1].bias)


def test_nothing_is_kept_if_the_loss_is_no_better() -> None:
    net = copies()
    data = [(x, torch.zeros(8)) for x in batches(8, 3)]
    plain, _ = shrink(net, data[0][0], width=0.5)
    seen: list[float] = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # It rises from call to call: before, then after.
        seen.append(float(len(seen)))
        return torch.tensor(seen[-1])

    small, report = shrink(net, data[0][0], width=0.5, data=data, loss=loss)
    assert report.compensation[""].before == 0.0
    assert report.compensation[""].after == 1.0
    assert "no better" in report.compensation["2"].why and not report.compensation["2"].kept
    for name, tensor in plain.state_dict().items():
        assert torch.equal(small.state_dict()[name], tensor), name


def test_a_constant_goes_to_the_mean_of_the_batch_norm_that_follows() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False), nn.BatchNorm2d(3)
    ).eval()
    with torch.no_grad():
        # Two units that are 1 and 2 everywhere.
        net[0].weight[:2] = 0.0
        net[0].bias[:2] = torch.tensor([1.0, 2.0])
        net[0].weight[2:] *= 10.0
        net[2].weight[:, 2:] *= 10.0
        net[3].weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
    data = batches(4, 2, 5, 5)
    small, report = shrink(net, data[0], width=0.5, data=data)
    assert report.compensation["2"].kept and "3" not in report.compensation
    shift = net[2].weight[:, 0].sum((1, 2)) + 2.0 * net[2].weight[:, 1].sum((1, 2))
    moved = net[3].running_mean - small[3].running_mean
    torch.testing.assert_close(moved, shift.detach(), rtol=0.02, atol=0.02)
    assert distance(net, small, torch.randn(4, 2, 5, 5)) < 0.02


class Residual(nn.Module):
    """A sum of two branches, the second with a batch norm or without."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5) if norm else nn.Identity()
        self.one, self.back = nn.Linear(3, 4), nn.Linear(4, 5, bias=False)
        self.other, self.last = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs after the sum."""
        first = self.back(torch.relu(self.one(x)))
        return self.last(first + self.norm(self.other(x)))


@pytest.mark.parametrize("norm", [False, True])
def test_a_summand_makes_up_for_what_another_lacks(norm: bool) -> None:
    # `back` has no bias, so that what it lacks of a constant is left to `other`, whose inputs have not changed.
    net, data = Residual(norm=norm).eval(), batches(32, 3)
    scale = torch.ones(5)
    with torch.no_grad():
        if norm:
            net.other.bias = None
            net.norm.weight.copy_(torch.tensor([2.0, -0.5, 1.0, 3.0, 0.1]))
            net.norm.running_var.copy_(torch.tensor([1.0, 4.0, 0.5, 1.0, 2.0]))
            scale = (net.norm.running_var + net.norm.eps).sqrt() / net.norm.weight
        net.one.weight[:2] = 0.0
        net.one.bias[:2] = torch.tensor([0.2, 0.3])
        net.one.bias[2:] = 0.0
        net.one.weight[2:] *= 5.0
    small, report = shrink(net, data[0], width=0.5, only=["one.*"], data=data)
    assert report.compensation["other"].kept
    with torch.no_grad():
        x = torch.cat(data[:4])
        left = small.back(torch.relu(small.one(x)))
        targets = net.other(x) + scale * (net.back(torch.relu(net.one(x))) - left)
    start = net.other.weight.detach().double().numpy()
    weights, constants = ridge(x.double().numpy(), targets.double().numpy(), start)
    np.testing.assert_allclose(small.other.weight.detach().numpy(), weights, rtol=1e-3, atol=1e-4)
    got = -small.norm.running_mean if norm else small.other.bias.detach()
    np.testing.assert_allclose(got.numpy(), constants, rtol=1e-3, atol=1e-4)


class Literal(nn.Module):
    """A network whose code has a width as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = copies()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs."""
        return self.net[2](self.net[1](self.net[0](x)).reshape(-1, 4))


def test_the_graph_form_is_compensated_too() -> None:
    torch.manual_seed(3)
    net = Literal()
    torch.manual_seed(3)
    other, data = copies(), batches(8, 3)
    graph, report = shrink(net, data[0], width=0.5, data=data)
    module, _ = shrink(other, data[0], width=0.5, data=data)
    assert report.form == "graph"
    torch.testing.assert_close(graph(data[0]), module(data[0]))
    assert distance(net, graph, data[4]) < 0.1


def _generated(data: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    yield from data


def test_data_of_any_kind_gives_the_same() -> None:
    net, data = copies(), batches(8, 3)
    expected, _ = shrink(net, data[0], width=0.5, data=data)
    pairs = list(zip(torch.cat(data), range(40), strict=True))
    for given in (
        _generated(data),
        [{"input": x} for x in data],
        [(x, torch.zeros(8)) for x in data],
        [x.numpy() for x in data],
        DataLoader(pairs, batch_size=8),  # type: ignore[arg-type]
    ):
        small, report = shrink(net, data[0], width=0.5, data=given)
        assert report.compensation["2"].kept
        torch.testing.assert_close(small[2].weight, expected[2].weight)


def test_an_iterator_serves_the_score_and_the_compensation() -> None:
    net, data = copies(), batches(8, 3)
    expected, _ = shrink(net, data[0], width=0.5, score="apoz", data=data)
    small, _ = shrink(net, data[0], width=0.5, score="apoz", data=_generated(data))
    torch.testing.assert_close(small[2].weight, expected[2].weight)


class Fixed(nn.Module):
    """A network whose exported graph has the size of the batch in it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = copies()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of each of the six inputs."""
        rows = x.reshape(x.shape[0] * 2, 3)
        return self.net(rows).reshape(x.shape[0], 2, 2)


def test_batches_of_other_shapes_than_the_example() -> None:
    net = Fixed()
    data = [torch.randn(size, 2, 3) for size in (4, 4, 3, 4, 2)]
    small, _ = shrink(net, data[0][:1], width=0.5, data=data)
    whole = torch.cat(data[:4]).reshape(-1, 3)
    expected, _ = shrink(net.net, whole[:1], width=0.5, data=[whole, data[4].reshape(-1, 3)])
    torch.testing.assert_close(small.net[2].weight, expected[2].weight, rtol=1e-3, atol=1e-5)


def test_too_many_shapes_are_refused_with_the_way_round() -> None:
    data = [torch.randn(size, 3) for size in range(1, 12)]
    with pytest.raises(InvalidArgument, match="too many different shapes"):
        shrink(copies(), data[0], width=0.5, data=data)
    size = torch.export.Dim("size")
    small, report = shrink(copies(), data[4], width=0.5, data=data, dynamic_shapes=({0: size},))
    assert report.compensation["2"].kept


def test_a_single_batch_is_divided_and_a_single_example_refused() -> None:
    net, (x,) = copies(), batches(20, 3, count=1)
    small, report = shrink(net, x, width=0.5, data=[x])
    expected, _ = shrink(net, x, width=0.5, data=[x[:16], x[16:]])
    assert torch.equal(small[2].weight, expected[2].weight) and report.compensation[""].kept
    with pytest.raises(InvalidArgument, match="one example"):
        shrink(net, x, width=0.5, data=[x[:1]])
    assert not shrink(net, x, width=0.5, data=[x[:1]], compensate=False)[1].compensation


def test_a_layer_of_too_many_inputs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refit_outcome, "MOST_INPUTS", 2)
    data = batches(8, 3)
    _, report = shrink(copies(), data[0], width=0.75, data=data)
    assert report.compensation["2"].why == "it has 3 inputs, more than 2"
    monkeypatch.setattr(refit_outcome, "MOST_INPUTS", 3)
    assert not shrink(copies(), data[0], width=0.75, data=data)[1].compensation["2"].why


def test_inputs_that_are_not_finite_are_named() -> None:
    data = batches(8, 3)
    data[1][0] = torch.nan
    with pytest.raises(NonFinite, match="0: weights or inputs are NaN"):
        shrink(copies(), data[0], width=0.5, data=data)


def test_a_buffer_that_the_forward_writes_stays_as_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copies()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1.0)
            return self.net(x) + 0.0 * self.seen

    net, data = Counting(), batches(8, 3)
    small, report = shrink(net, data[0], width=0.5, data=data)
    assert report.compensation["net.2"].kept
    assert (float(small.seen), float(net.seen)) == (0.0, 0.0)


def test_nothing_is_changed_without_data_or_a_target_or_when_off() -> None:
    net, data = copies(), batches(8, 3)
    plain, report = shrink(net, data[0], width=0.5)
    assert report.compensation == {}
    assert shrink(net, data[0], data=data)[1].compensation == {}
    off, report = shrink(net, data[0], width=0.5, data=data, compensate=False)
    assert report.compensation == {} and torch.equal(off[2].weight, plain[2].weight)


def test_a_tied_weight_is_left_alone_with_the_reason() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.inner = nn.Embedding(7, 4), nn.Linear(4, 6)
            self.back, self.head = nn.Linear(6, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.back(torch.relu(self.inner(self.embedding(x)))))

    data = [torch.randint(7, (6, 3)) for _ in range(5)]
    small, report = shrink(Tied(), data[0], width=0.5, only="inner.*", data=data)
    # A tensor with several names goes by the first of them.
    assert "several operations" in report.compensation["embedding"].why
    assert small.head.weight is small.embedding.weight
    assert report.compensation["back"].kept


@pytest.mark.parametrize(("kind", "first"), [(nn.LSTM, True), (nn.GRU, False)])
def test_recurrent_layers(kind: Any, first: bool) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = kind(3, 8, num_layers=2, batch_first=first), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(x)[0])

    net, data = Recurrent(), batches(16, 9, 3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 2.0
    small, report = shrink(net, data[0], width=0.5, data=data)
    plain, _ = shrink(net, data[0], width=0.5)
    refits = [report.compensation[f"rnn.weight_ih_l{layer}"] for layer in (0, 1)]
    assert all(refit.kept and refit.after < refit.before for refit in refits)
    assert distance(net, small, data[4]) < 0.7 * distance(net, plain, data[4])


def test_the_first_step_of_a_recurrent_layer_by_hand() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(3, 4, batch_first=True)
            self.before, self.head = nn.Linear(5, 3), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(self.before(x))[0])

    # One step from a state of zero: only the inputs count, of which one goes.
    net, data = One(), batches(24, 1, 5)
    small, report = shrink(net, data[0], width=0.67, only=["before.*"], data=data)
    assert report.compensation["rnn.weight_ih_l0"].kept
    plain, _ = shrink(net, data[0], width=0.67, only=["before.*"])
    with torch.no_grad():
        x = torch.cat(data[:4])[:, 0]
        left, full = small.before(x), net.before(x)
        sums = full @ net.rnn.weight_ih_l0.T + net.rnn.bias_ih_l0 + net.rnn.bias_hh_l0
    joint = np.concatenate([left.double().numpy(), np.zeros((len(x), 4))], axis=1)
    start = torch.cat([plain.rnn.weight_ih_l0, plain.rnn.weight_hh_l0], 1).detach().double().numpy()
    weights, constants = ridge(joint, sums.double().numpy(), start)
    got = small.rnn.weight_ih_l0.detach().numpy()
    np.testing.assert_allclose(got, weights[:, :2], rtol=1e-3, atol=1e-4)
    biases = (small.rnn.bias_ih_l0 + small.rnn.bias_hh_l0).detach().numpy()
    np.testing.assert_allclose(biases, constants, rtol=1e-3, atol=1e-4)


def test_a_batch_norm_of_its_own_is_re_estimated() -> None:
    # The weight in front of the norm is computed, so that nothing but the norm can take the constants that went.
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.back = nn.Linear(3, 4), nn.Linear(4, 5, bias=False)
            self.norm, self.last = nn.BatchNorm1d(5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.back.weight * 1.0
            return self.last(self.norm(F.linear(torch.relu(self.one(x)), weight)))

    net, data = Computed().eval(), batches(32, 3)
    with torch.no_grad():
        net.one.weight[:2] = 0.0
        net.one.bias[:2] = torch.tensor([0.2, 0.3])
        net.one.weight[2:] *= 5.0
        values = net.back(torch.relu(net.one(torch.cat(data))))
        net.norm.running_mean.copy_(values.mean(0))
        net.norm.running_var.copy_(values.var(0))
    small, report = shrink(net, data[0], width=0.5, only=["one.*"], data=data)
    refit = report.compensation["norm"]
    with torch.no_grad():
        values = net.back(torch.relu(net.one(torch.cat(data[:4]))))
        values = values - net.back.weight[:, :2] @ torch.tensor([0.2, 0.3])
        held = net.back(torch.relu(net.one(data[4])))
        left, expected = held - net.back.weight[:, :2] @ torch.tensor([0.2, 0.3]), net.norm(held)
        errors = [
            float((F.batch_norm(left, *pair) - expected).norm() / expected.norm())
            for pair in (
                (net.norm.running_mean, net.norm.running_var),
                (values.mean(0), values.var(0)),
            )
        ]
    assert (refit.before, refit.after) == pytest.approx(tuple(errors), rel=1e-3)
    assert refit.kept and report.compensation[""].kept
    torch.testing.assert_close(small.norm.running_mean, values.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small.norm.running_var, values.var(0), rtol=1e-4, atol=1e-5)
