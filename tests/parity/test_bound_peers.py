"""Bounds against their peers: equal where they are right, beside them where they are not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import karikomi as kk
from contract.namespaces import INSTALLED, load_quietly

# Keras comes with TensorFlow; it is driven on torch here.
needs_keras = pytest.mark.skipif("tensorflow" not in INSTALLED, reason="no Keras installed")


def sample(seed: int = 0, shape: tuple[int, ...] = (12, 7), scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, scale, shape).astype(np.float32)


def keras_bounded(array: np.ndarray, name: str, **arguments: Any) -> np.ndarray:
    """Return an array of shape (in, out) after one of Keras' constraints."""
    keras = load_quietly("keras")
    constraint = getattr(keras.constraints, name)(**arguments)
    return keras.ops.convert_to_numpy(constraint(keras.ops.convert_to_tensor(array)))


def ours_torch(array: np.ndarray, rule: Any) -> np.ndarray:
    """Return the same for a Linear, whose weight is (out, in)."""
    layer = nn.Linear(array.shape[0], array.shape[1], bias=False)
    layer.weight.data.copy_(torch.from_numpy(array.T.copy()))
    kk.torch.bound_(layer, rule)
    return layer.weight.detach().numpy().T


def ours_numpy(array: np.ndarray, rule: Any) -> np.ndarray:
    return kk.numpy.bound({"w": array}, rule, unit_axes={"w": 1})[0]["w"]


@needs_keras
@pytest.mark.parametrize("ours", [ours_torch, ours_numpy])
@pytest.mark.parametrize(
    ("rule", "name", "arguments"),
    [
        (kk.bound.MaxNorm(2.0), "MaxNorm", {"max_value": 2.0, "axis": 0}),
        (kk.bound.UnitNorm(), "UnitNorm", {"axis": 0}),
        (kk.bound.NonNegative(), "NonNeg", {}),
    ],
    ids=lambda one: type(one).__name__ if not isinstance(one, str | dict) else "",
)
def test_the_same_as_keras(
    ours: Callable[..., np.ndarray], rule: Any, name: str, arguments: dict[str, Any]
) -> None:
    array = sample()
    theirs = keras_bounded(array, name, **arguments)
    # Their epsilon of 1e-7 stands beside norms of about 1 to 4.
    np.testing.assert_allclose(ours(array, rule), theirs, rtol=1e-6)
    assert not np.array_equal(theirs, array)


@needs_keras
def test_max_norm_of_keras_drifts_below_the_limit_and_ours_stands() -> None:
    theirs = mine = np.array([[0.003], [0.004]], dtype=np.float32)
    small = float(np.linalg.norm(theirs))
    state = None
    for _ in range(500):
        theirs = keras_bounded(theirs, "MaxNorm", max_value=1.0, axis=0)
        found, _, state = kk.numpy.bound(
            {"w": mine}, kk.bound.MaxNorm(1.0), state, unit_axes={"w": 1}
        )
        mine = found["w"]
    # Far within the ball nothing is to be done; 500 calls take 1 % of it away all the same.
    assert np.linalg.norm(theirs) < 0.992 * small
    assert mine.tobytes() == np.array([[0.003], [0.004]], dtype=np.float32).tobytes()


@needs_keras
def test_unit_norm_of_keras_leaves_short_units_short() -> None:
    short = np.array([[3e-7], [4e-7]], dtype=np.float32)
    assert np.linalg.norm(keras_bounded(short, "UnitNorm", axis=0)) == pytest.approx(5 / 6)
    assert np.linalg.norm(ours_numpy(short, kk.bound.UnitNorm())) == pytest.approx(1.0)


@needs_keras
def test_the_axis_of_keras_is_per_channel_pair_where_ours_is_per_filter() -> None:
    kernel = sample(3, (3, 3, 4, 5))  # height, width, in, out
    theirs = keras_bounded(kernel, "MaxNorm", max_value=0.5, axis=0)
    layer = nn.Conv2d(4, 5, 3, bias=False)
    layer.weight.data.copy_(torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()))
    kk.torch.bound_(layer, kk.bound.MaxNorm(0.5))
    assert np.linalg.norm(theirs.reshape(-1, 5), axis=0).min() > 1.0
    ours = layer.weight.detach().flatten(1).norm(dim=1)
    assert ours.tolist() == pytest.approx([0.5] * 5, rel=1e-6)


class TestSpectralNorm:
    """torch's parametrization, which divides by sigma in every forward pass."""

    def test_once_converged_both_have_sigma_one(self) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(30, 20, bias=False)
        layer.weight.data.mul_(5.0)
        ours = nn.Linear(30, 20, bias=False)
        ours.weight.data.copy_(layer.weight)
        kk.torch.bound_(ours, kk.bound.SpectralCap(1.0))
        theirs = nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=200)
        _ = theirs.train().weight
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-3, atol=1e-5)

    def test_theirs_begins_above_one_and_stretches_what_is_small(self) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(300, 300, bias=False)
        layer.weight.data.normal_()
        ours = nn.Linear(300, 300, bias=False)
        ours.weight.data.copy_(layer.weight)
        kk.torch.bound_(ours, kk.bound.SpectralCap(1.0))
        theirs = nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=1)
        first = torch.linalg.svdvals(theirs.train().weight.detach())[0]
        # Fifteen iterations at construction and one a pass: the first steps run above the cap.
        assert first > 1.005 > 1.0001 > torch.linalg.svdvals(ours.weight.detach())[0]
        small = nn.Linear(4, 4, bias=False)
        small.weight.data.mul_(0.01)
        before = small.weight.clone()
        kk.torch.bound_(small, kk.bound.SpectralCap(1.0))
        assert torch.equal(small.weight, before)
        stretched = nn.utils.parametrizations.spectral_norm(small)
        assert float(torch.linalg.svdvals(stretched.weight.detach())[0]) > 0.9


def published_clipping(parameters: Iterable[torch.Tensor], k: float) -> None:
    """The loop of the authors of InitScaled: a vector takes the fan-in of the last matrix met."""
    fan_in = 0.0
    for parameter in parameters:
        if parameter.dim() not in (1, 2, 4):
            raise ValueError("neither vector, matrix nor kernel")
        if parameter.dim() > 1:
            fan_in = float(parameter[0].numel())
        parameter.data.clamp_(-k / math.sqrt(fan_in), k / math.sqrt(fan_in))


class TestInitScaled:
    """Elsayed et al. 2024."""

    @staticmethod
    def network() -> nn.Sequential:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))
        for parameter in model.parameters():
            parameter.data.mul_(3.0)
        return model

    @pytest.mark.parametrize("k", [1.0, 2.0, 5.0])
    def test_the_same_where_every_bias_follows_its_weight(self, k: float) -> None:
        theirs, ours = self.network(), self.network()
        published_clipping(theirs.parameters(), k)
        kk.torch.bound_(ours, kk.bound.InitScaled(k))
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0.0)

    def test_by_order_a_bias_gets_the_range_of_another_layer(self) -> None:
        theirs, ours = self.network(), self.network()
        for model in (theirs, ours):
            model[3].bias.data.fill_(9.0)
        weights = [p for p in theirs.parameters() if p.dim() > 1]
        biases = [p for p in theirs.parameters() if p.dim() == 1]
        # As optimizers are told to: decay on matrices, none on vectors.
        published_clipping([*weights[::-1], *biases], 1.0)
        kk.torch.bound_(ours, kk.bound.InitScaled(1.0))
        assert theirs[3].bias.unique().tolist() == pytest.approx([27**-0.5])
        assert ours[3].bias.unique().tolist() == pytest.approx([32**-0.5])

    def test_gains_and_kernels_of_other_ranks(self) -> None:
        gained = nn.Sequential(nn.Linear(400, 4), nn.LayerNorm(4))
        published_clipping(gained.parameters(), 1.0)
        assert gained[1].weight.unique().tolist() == pytest.approx([0.05])  # the norm is dead
        outcome, _ = kk.torch.bound_(
            fresh := nn.Sequential(nn.Linear(400, 4), nn.LayerNorm(4)), kk.bound.InitScaled(1.0)
        )
        assert fresh[1].weight.unique().tolist() == [1.0]
        assert outcome.left_alone["1.weight"] == "LayerNorm has no fan-in"
        for layer in (nn.Conv1d(2, 3, 4), nn.Conv3d(2, 3, 4)):
            with pytest.raises(ValueError, match="neither vector"):
                published_clipping(layer.parameters(), 1.0)
            layer.weight.data.fill_(9.0)
            kk.torch.bound_(layer, kk.bound.InitScaled(1.0))
            inputs = layer.weight[0].numel()
            assert layer.weight.unique().tolist() == pytest.approx([inputs**-0.5])


class TestQKClip:
    """Kimi K2's formula, and what Megatron-LM does with groups."""

    LOGITS = np.array([400.0, 50.0, 90.0, 80.0])

    def heads(self, key_heads: int) -> dict[str, np.ndarray]:
        return {"wq": sample(1, (8, 5)), "wk": sample(2, (2 * key_heads, 5))}

    def ours(self, key_heads: int) -> dict[str, np.ndarray]:
        found, _, _ = kk.numpy.bound(
            self.heads(key_heads),
            kk.bound.QKClip(100.0),
            logits={"a": self.LOGITS},
            attention={"a": ("wq", "wk")},
        )
        return found

    def test_the_published_formula(self) -> None:
        gamma = np.minimum(1.0, 100.0 / self.LOGITS)
        before, found = self.heads(4), self.ours(4)
        for name in ("wq", "wk"):
            expected = before[name] * np.repeat(np.sqrt(gamma), 2)[:, None]
            np.testing.assert_allclose(found[name], expected, rtol=1e-6)

    def test_by_group_a_head_below_the_limit_is_clipped_and_by_ours_none_is(self) -> None:
        before, found = self.heads(2), self.ours(2)
        grouped = self.LOGITS.reshape(2, 2).max(1)
        gamma = np.minimum(1.0, 100.0 / grouped)
        by_group = self.LOGITS * np.repeat(np.sqrt(gamma) * np.sqrt(gamma), 2)
        assert by_group.tolist() == [100.0, 12.5, 90.0, 80.0]  # the second head began at 50
        products = [
            np.einsum("d,e->de", found["wq"][2 * h], found["wk"][2 * (h // 2)]) for h in range(4)
        ]
        whole = [
            np.einsum("d,e->de", before["wq"][2 * h], before["wk"][2 * (h // 2)]) for h in range(4)
        ]
        shares = [
            float(np.linalg.norm(a) / np.linalg.norm(b))
            for a, b in zip(products, whole, strict=True)
        ]
        assert (self.LOGITS * shares).tolist() == pytest.approx([100.0, 50.0, 90.0, 80.0])
