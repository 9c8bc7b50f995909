"""Scores against their peers: equal where they define the same thing, both shown where a peer errs.

torch.nn.utils.prune and Torch-Pruning are run; of what cannot be installed here (jaxpruner, the
authors' scripts of GraSP, SynFlow, LAMP) the formulas stand in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from contract.namespaces import load_quietly
from karikomi.prune import (
    FPGM,
    LAMP,
    SNIP,
    BNScale,
    Fisher,
    GraSP,
    L2Norm,
    Magnitude,
    Movement,
    Random,
    SynFlow,
    Taylor,
    Tensor,
    allocate,
)

needs_torch_pruning = pytest.mark.skipif(
    find_spec("torch_pruning") is None, reason="no Torch-Pruning installed"
)


def sample(shape: tuple[int, ...] = (6, 5), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def without(scores: np.ndarray, remove: int) -> np.ndarray:
    """Return the mask that is left when so many of the lowest scores go."""
    mask = np.ones(scores.size, bool)
    mask[np.argsort(scores, axis=None, kind="stable")[:remove]] = False
    return mask.reshape(scores.shape)


# --- torch.nn.utils.prune ---


def theirs(weights: np.ndarray, method: Callable[..., Any], **arguments: Any) -> np.ndarray:
    layer = nn.Linear(weights.shape[1], weights.shape[0])
    layer.weight.data = torch.from_numpy(weights)
    method(layer, "weight", **arguments)
    mask: torch.Tensor = layer.weight_mask  # type: ignore[assignment]
    return mask.numpy().astype(bool)


@pytest.mark.parametrize("remove", [0, 1, 17, 29])
def test_magnitude_is_torch_l1_unstructured(remove: int) -> None:
    weights = sample()
    found = without(Magnitude().of_weights(weights, {}, xp=np), remove)
    np.testing.assert_array_equal(found, theirs(weights, prune.l1_unstructured, amount=remove))


@pytest.mark.parametrize(("score", "n"), [(Magnitude(), 1), (L2Norm(), 2)])
@pytest.mark.parametrize("remove", [1, 3, 5])
def test_group_norms_are_torch_ln_structured(score: Any, n: int, remove: int) -> None:
    weights = sample()
    found = without(score.of_groups(weights, {}, xp=np), remove)
    expected = theirs(weights, prune.ln_structured, amount=remove, n=n, dim=0)
    np.testing.assert_array_equal(np.broadcast_to(found[:, None], weights.shape), expected)


@pytest.mark.parametrize("amount", [0, 7, 0.3, 0.77])
def test_random_removes_as_many_as_torch(amount: float) -> None:
    weights = sample()
    expected = theirs(weights, prune.random_unstructured, amount=amount)
    noise = np.random.default_rng(1).random(weights.shape)
    remove = amount if isinstance(amount, int) else round(amount * weights.size)
    found = without(Random().of_weights(weights, {"noise": noise}, xp=np), remove)
    assert found.sum() == expected.sum()


# --- Torch-Pruning ---

UNITS = 4


class Peer:
    """A convolution, a batch norm and a convolution that reads them, as Torch-Pruning groups them."""

    def __init__(self) -> None:
        self.library = load_quietly("torch_pruning")
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(2, UNITS, 3), nn.BatchNorm2d(UNITS), nn.ReLU(), nn.Conv2d(UNITS, 3, 1)
        )
        self.layer: Any = self.net[0]
        self.norm: Any = self.net[1]
        nn.init.normal_(self.norm.weight)
        graph = self.library.DependencyGraph().build_dependency(self.net, torch.randn(1, 2, 5, 5))
        function = self.library.prune_conv_out_channels
        self.group = graph.get_pruning_group(self.layer, function, idxs=list(range(UNITS)))

    def importance(self, name: str, **arguments: Any) -> Any:
        """Return their numbers of the first layer's own weights."""
        found = self.prepared(name, **arguments)(self.group)
        return None if found is None else found.numpy()

    def prepared(self, name: str, **arguments: Any) -> Any:
        given = {"group_reduction": "first", **arguments}
        return getattr(self.library.importance, name)(**given)

    def losses(self) -> Iterable[torch.Tensor]:
        torch.manual_seed(1)
        for inputs in torch.randn(3, 1, 2, 5, 5):
            yield self.net.eval()(inputs).square().sum()

    @property
    def weights(self) -> np.ndarray:
        return rows(self.layer.weight)

    @property
    def gradient(self) -> dict[str, np.ndarray]:
        return {"gradient": rows(self.layer.weight.grad)}


def rows(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().flatten(1).numpy()


@pytest.fixture
def peer() -> Peer:
    return Peer()


@needs_torch_pruning
def test_magnitudes_are_those_of_torch_pruning(peer: Peer) -> None:
    one = peer.importance("MagnitudeImportance", p=1, normalizer=None)
    np.testing.assert_allclose(Magnitude().of_groups(peer.weights, {}, xp=np), one, rtol=1e-6)
    two = peer.importance("MagnitudeImportance", p=2, normalizer=None)
    # Theirs leaves the root out, which changes no order.
    np.testing.assert_allclose(L2Norm().of_groups(peer.weights, {}, xp=np) ** 2, two, rtol=1e-6)


@needs_torch_pruning
def test_lamp_is_that_of_torch_pruning(peer: Peer) -> None:
    expected = peer.importance("LAMPImportance")
    np.testing.assert_allclose(LAMP().of_groups(peer.weights, {}, xp=np), expected, rtol=1e-6)


@needs_torch_pruning
def test_batch_norm_scales_are_those_of_torch_pruning(peer: Peer) -> None:
    gate = {"gate": peer.norm.weight.detach().numpy()}
    expected = peer.importance("BNScaleImportance", group_reduction="mean", normalizer=None)
    np.testing.assert_allclose(BNScale().of_groups(peer.weights, gate, xp=np), expected, rtol=1e-6)


@needs_torch_pruning
def test_fpgm_of_torch_pruning_cannot_tell_opposite_units_apart(peer: Peer) -> None:
    with torch.no_grad():
        peer.layer.weight.abs_()
    expected = peer.importance("FPGMImportance", p=1, normalizer=None)
    np.testing.assert_allclose(FPGM().of_groups(peer.weights, {}, xp=np), expected, rtol=1e-5)
    # With a unit and its opposite theirs sees twins, and ours the farthest two of all.
    with torch.no_grad():
        peer.layer.weight[0] = -peer.layer.weight[1]
    twins = peer.importance("FPGMImportance", p=1, normalizer=None)
    assert twins is not None and twins[0] == pytest.approx(twins[1], rel=1e-5)
    found = FPGM().of_groups(peer.weights, {}, xp=np)
    apart = np.linalg.norm(peer.weights[:, None] - peer.weights[None], axis=2).sum(1)
    np.testing.assert_allclose(found, apart, rtol=1e-6)
    assert np.argmax(found) == 0 and found[0] > 1.3 * found[1]


@needs_torch_pruning
def test_first_order_terms_are_those_of_torch_pruning(peer: Peer) -> None:
    sum(peer.losses(), torch.zeros(())).backward()
    # What theirs calls Taylor is by default the sum of |w g|, which is SNIP's.
    single = peer.importance("TaylorImportance", normalizer=None)
    found = SNIP().of_groups(peer.weights, peer.gradient, xp=np)
    np.testing.assert_allclose(found, single, rtol=1e-5)
    joint = peer.importance("TaylorImportance", normalizer=None, multivariable=True)
    found = Taylor().of_groups(peer.weights, peer.gradient, xp=np)
    np.testing.assert_allclose(np.sqrt(found), joint, rtol=1e-5)


@needs_torch_pruning
def test_taylor_of_torch_pruning_ignores_batch_norm_gates(peer: Peer) -> None:
    sum(peer.losses(), torch.zeros(())).backward()
    gates = {"target_types": [nn.BatchNorm2d], "normalizer": None, "group_reduction": "mean"}
    assert peer.importance("TaylorImportance", **gates) is None
    assert peer.importance("MagnitudeImportance", p=1, **gates) is not None
    scale, slope = peer.norm.weight.detach().numpy(), peer.norm.weight.grad.numpy()
    found = Taylor().of_groups(scale[:, None], {"gradient": slope[:, None]}, xp=np)
    np.testing.assert_allclose(found, (scale * slope) ** 2, rtol=1e-6)
    assert (found > 0).all()


@needs_torch_pruning
def test_the_hessian_of_torch_pruning_counts_the_last_sample_only(peer: Peer) -> None:
    scorer, squares = peer.prepared("HessianImportance", normalizer=None), []
    for loss in peer.losses():
        peer.net.zero_grad()
        loss.backward()
        scorer.accumulate_grad(peer.net)
        squares.append(rows(peer.layer.weight.grad) ** 2)
    expected = scorer(peer.group).numpy()
    last, mean = (
        2 * Fisher().of_groups(peer.weights, {"squared_gradient": one}, xp=np)
        for one in (squares[-1], np.mean(squares, axis=0))
    )
    np.testing.assert_allclose(expected, last, rtol=1e-5)
    assert not np.allclose(expected, mean, rtol=0.05)
    np.testing.assert_allclose(mean, (peer.weights**2 * np.mean(squares, axis=0)).sum(1))


# --- jaxpruner's definitions ---


def test_jaxpruner_magnitude_and_saliency() -> None:
    """Its MagnitudePruning scores |p|, its SaliencyPruning |p g|."""
    weights, gradient = sample(), sample(seed=1)
    found = Magnitude().of_weights(weights, {}, xp=np)
    np.testing.assert_array_equal(found, np.sqrt(weights**2))
    found = SNIP().of_weights(weights, {"gradient": gradient}, xp=np)
    np.testing.assert_allclose(found, np.abs(weights) * np.abs(gradient))


# Shapes, sparsity -> sparsity of each, from its tests of the distribution, to two digits.
JAXPRUNER_ERK = [
    ({"a": (2, 4)}, 0.5, {"a": 0.5}),
    ({"a": (2, 4), "b": (3, 6), "c": (2, 4, 6)}, 0.5, {"a": 0.0, "b": 0.31, "c": 0.655}),
    ({"a": (2, 4), "b": (3, 6), "c": (2, 4, 6)}, 0.8, {"a": 0.556, "b": 0.70, "c": 0.85}),
    ({"a": (2, 4), "c": (3, 6, 7), "d": (7, 4)}, 0.5, {"a": 0.0, "c": 0.64, "d": 0.0}),
    ({"a": (2, 4), "c": (3, 6, 7)}, 0.5, {"a": 0.0, "c": 0.53}),
]


@pytest.mark.parametrize(("shapes", "sparsity", "expected"), JAXPRUNER_ERK)
def test_jaxpruner_erk(
    shapes: dict[str, tuple[int, ...]], sparsity: float, expected: dict[str, float]
) -> None:
    """In units of 1000 items per weight, so that rounding to whole items does not show.

    Theirs rounds the zeros of each tensor down before it adds them up, and so removes less.
    """
    tensors = {
        name: Tensor(items=1000 * int(np.prod(shape)), shape=shape)
        for name, shape in shapes.items()
    }
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    theirs = sum(int(sparsity * size) for size in sizes) / sum(sizes)
    for pool in allocate("erk", tensors, theirs):
        (name,) = pool.names
        assert pool.remove / tensors[name].items == pytest.approx(expected[name], abs=0.005)


# --- the authors' conventions ---


def small_net() -> tuple[nn.Sequential, list[torch.Tensor]]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return net, [net[0].weight, net[2].weight]  # type: ignore[list-item]


def loss_of(net: nn.Module) -> torch.Tensor:
    inputs = torch.randn(8, 4, dtype=torch.double, generator=torch.Generator().manual_seed(4))
    return nn.functional.cross_entropy(net(inputs), torch.arange(8) % 3)


def test_grasp_removes_what_the_authors_remove() -> None:
    """They remove the largest of -w (H g); Synaptic-Flow's code the smallest of w (H g): the same."""
    net, weights = small_net()
    slopes = torch.autograd.grad(loss_of(net), weights, create_graph=True)
    fixed = [slope.detach() for slope in slopes]
    along = sum((one * two).sum() for one, two in zip(fixed, slopes, strict=True))
    products = torch.autograd.grad(along, weights)  # type: ignore[arg-type]
    found = np.concatenate(
        [
            GraSP().of_weights(w.detach().numpy(), {"hessian_gradient": h.numpy()}, xp=np).ravel()
            for w, h in zip(weights, products, strict=True)
        ]
    )
    paper = np.concatenate(
        [(-w.detach() * h).numpy().ravel() for w, h in zip(weights, products, strict=True)]
    )
    remove = 20
    largest = np.argsort(-paper, kind="stable")[:remove]
    assert sorted(np.flatnonzero(~without(found, remove))) == sorted(largest)
    # And what goes raises the gradient's norm: a small step of these weights towards zero.
    before = sum(float(slope.square().sum()) for slope in fixed)
    with torch.no_grad():
        for weight, mask in zip(
            weights, np.split(without(found, remove), [weights[0].numel()]), strict=True
        ):
            weight.mul_(torch.from_numpy(np.where(mask, 1.0, 0.999)).view_as(weight))
    after = torch.autograd.grad(loss_of(net), weights)
    assert sum(float(slope.square().sum()) for slope in after) > before


def test_snip_is_the_gradient_of_a_mask() -> None:
    net, weights = small_net()
    slopes = torch.autograd.grad(loss_of(net), weights)
    masks = {
        f"{index}.weight": torch.ones_like(weight, requires_grad=True)
        for index, weight in zip((0, 2), weights, strict=True)
    }
    masked = {name: net.get_parameter(name) * mask for name, mask in masks.items()}
    inputs = torch.randn(8, 4, dtype=torch.double, generator=torch.Generator().manual_seed(4))
    outputs = torch.func.functional_call(net, masked, inputs)
    nn.functional.cross_entropy(outputs, torch.arange(8) % 3).backward()
    for weight, slope, mask in zip(weights, slopes, masks.values(), strict=True):
        found = SNIP().of_weights(weight.detach().numpy(), {"gradient": slope.numpy()}, xp=np)
        assert mask.grad is not None
        np.testing.assert_allclose(found, mask.grad.abs().numpy())


def test_synflow_is_the_flow_of_a_linear_network() -> None:
    first, second = (torch.from_numpy(sample(shape)) for shape in ((5, 4), (3, 5)))
    positive = [one.abs().requires_grad_() for one in (first, second)]
    flow = (positive[1] @ positive[0] @ torch.ones(4, dtype=torch.double)).sum()
    flow.backward()
    for weight, magnitude in zip((first, second), positive, strict=True):
        assert magnitude.grad is not None
        facts = {"flow": magnitude.grad.numpy()}
        found = SynFlow().of_weights(weight.numpy(), facts, xp=np)
        np.testing.assert_allclose(found, (magnitude.grad * magnitude).detach().abs().numpy())
        # Each layer passes on all of it.
        assert found.sum() == pytest.approx(flow.item())


def test_movement_is_how_far_descent_moved_weights_from_zero() -> None:
    """With plain steps, -lr w g is w times its step: half of what w^2 grew by, to first order."""
    net, weights = small_net()
    start = [weight.detach().clone() for weight in weights]
    moved, rate = [torch.zeros_like(weight) for weight in weights], 1e-4
    for _ in range(20):
        slopes = torch.autograd.grad(loss_of(net), weights)
        with torch.no_grad():
            for weight, slope, sums in zip(weights, slopes, moved, strict=True):
                sums -= rate * weight * slope
                weight -= rate * slope
    for weight, first, sums in zip(weights, start, moved, strict=True):
        found = Movement().of_weights(weight.detach().numpy(), {"moved": sums.numpy()}, xp=np)
        grown = (weight.detach() ** 2 - first**2).numpy() / 2
        np.testing.assert_allclose(found, grown, atol=1e-3 * np.abs(grown).max())


def test_lamp_removes_what_the_authors_remove() -> None:
    """Their amounts: how many of each tensor are below the k-th largest of all LAMP scores."""
    layers = {"a": sample((9, 7)), "b": 0.1 * sample((4, 5), 1), "c": 3.0 * sample((30,), 2)}
    ranked = {}
    for name, weights in layers.items():
        squares = np.sort(weights.ravel() ** 2)
        ranked[name] = np.array([squares[i] / squares[i:].sum() for i in range(len(squares))])
    tensors = {
        name: Tensor(items=w.size, scores=lambda w=w: np.abs(w).ravel().astype(np.float32))
        for name, w in layers.items()
    }
    total = sum(w.size for w in layers.values())
    for sparsity in (0.2, 0.5, 0.9):
        keep = total - round(sparsity * total)
        threshold = np.sort(np.concatenate(list(ranked.values())))[-keep]
        for pool in allocate("lamp", tensors, sparsity):
            (name,) = pool.names
            assert pool.remove == int((ranked[name] < threshold).sum())
