"""Bounds on torch modules: which tensors, which units, what is left alone, and resume."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import karikomi as kk
from karikomi.errors import InvalidArgument, NonFinite, Unsupported
from karikomi.torch.modules.fan_in import fan_ins
from karikomi.torch.numerics.spectral_norm import spectral_norm

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def linear(rows: list[list[float]], dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=False, dtype=dtype)
    layer.weight.data.copy_(torch.tensor(rows))
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
def test_unit_norm_scales_both_ways_and_writes_only_what_is_off(dtype: torch.dtype) -> None:
    layer = linear([[3.0, 4.0], [0.0, 0.0], [0.0, 0.25], [0.0, 1.0]], dtype)
    last = layer.weight[3].clone()
    outcome, _ = kk.torch.bound_(layer, kk.bound.UnitNorm(1.0))
    rounding = 2 * torch.finfo(dtype).eps
    sizes = layer.weight.detach().double().norm(dim=1)
    assert sizes.tolist() == pytest.approx([1.0, 0.0, 1.0, 1.0], abs=rounding)
    assert torch.equal(layer.weight[3], last)
    assert outcome.share_at_bound == 0.75 and outcome.engaged


def test_unit_norm_of_a_transposed_convolution_is_along_its_outputs() -> None:
    layer = nn.ConvTranspose2d(3, 5, 2)
    outcome, _ = kk.torch.bound_(layer, kk.bound.UnitNorm(2.0))
    assert layer.weight.movedim(1, 0).flatten(1).norm(dim=1).tolist() == pytest.approx([2.0] * 5)
    assert outcome.left_alone == {"bias": "a bias"}


@pytest.mark.parametrize("factor", [1e-36, 1e36])
def test_a_tensor_is_scaled_by_factors_beyond_float32(factor: float) -> None:
    layer = linear([[3.0, 4.0]])
    layer.weight.data.mul_(factor)
    kk.torch.bound_(layer, kk.bound.UnitNorm(5.0 * factor * 1.5, per="tensor"))
    assert (layer.weight / factor).tolist()[0] == pytest.approx([4.5, 6.0], rel=1e-5)


def test_a_tiny_weight_grows_without_overflow() -> None:
    layer = linear([[3e-28, 4e-28]])
    kk.torch.bound_(layer, kk.bound.UnitNorm(1.0, per="tensor"))
    assert layer.weight.tolist()[0] == pytest.approx([0.6, 0.8])
    layer = linear([[3e-28, 4e-28]])
    kk.torch.bound_(layer, kk.bound.UnitNorm(5e-25))
    assert layer.weight.tolist()[0] == pytest.approx([3e-25, 4e-25])


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_negative_zeroes_what_is_below_and_nothing_else(dtype: torch.dtype) -> None:
    layer = linear([[0.5, -2.0, 0.0, -0.25]], dtype)
    outcome, state = kk.torch.bound_(layer, kk.bound.NonNegative())
    assert layer.weight.tolist() == [[0.5, 0.0, 0.0, 0.0]]
    assert not torch.signbit(layer.weight).any()
    assert (outcome.pre, outcome.post, outcome.share_at_bound) == (2.0, 0.0, 0.75)
    outcome, _ = kk.torch.bound_(layer, kk.bound.NonNegative(), state)
    assert not outcome.engaged and outcome.share_at_bound == 0.75


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "rule",
    [kk.bound.NonNegative(), kk.bound.InitScaled(), kk.bound.SpectralCap(1.0), kk.bound.UnitNorm()],
    ids=lambda rule: type(rule).__name__,
)
def test_a_bad_weight_is_named(rule: Any, bad: float) -> None:
    layer = linear([[1.0, bad], [1.0, 1.0]])
    state = kk.torch.bound_(linear([[1.0, 2.0], [1.0, 1.0]]), rule)[1]
    for before in (None, state):
        with pytest.raises(NonFinite, match="^torch.bound_: non-finite weights in weight"):
            kk.torch.bound_(layer, rule, before)


class TestInitScaled:
    """The fan-in of layers."""

    LAYERS: dict[str, tuple[nn.Module, int]] = {
        "linear": (nn.Linear(7, 3), 7),
        "bilinear": (nn.Bilinear(5, 4, 3), 5),
        "conv1d": (nn.Conv1d(4, 6, 3, groups=2), 6),
        "conv2d": (nn.Conv2d(3, 8, (5, 2)), 30),
        "conv3d": (nn.Conv3d(2, 4, 3), 54),
        "transposed": (nn.ConvTranspose2d(6, 4, 3), 36),
        "lstm": (nn.LSTM(3, 9, num_layers=2, bidirectional=True), 9),
        "cell": (nn.GRUCell(3, 16), 16),
    }

    @pytest.mark.parametrize("name", LAYERS)
    def test_a_fresh_layer_fills_its_range_and_does_not_leave_it(self, name: str) -> None:
        layer, inputs = self.LAYERS[name]
        assert set(fan_ins(layer)[0].values()) == {inputs}
        before = {key: value.clone() for key, value in layer.state_dict().items()}
        outcome, _ = kk.torch.bound_(layer, kk.bound.InitScaled(1.0 + 1e-6))
        assert not outcome.engaged and outcome.left_alone == {}
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
        assert outcome.pre > 0.8 / inputs**0.5

    def test_attention_has_the_width_of_what_each_projection_reads(self) -> None:
        packed, _ = fan_ins(nn.MultiheadAttention(8, 2))
        assert packed == {
            **dict.fromkeys(["in_proj_weight", "in_proj_bias"], 8),
            **dict.fromkeys(["out_proj.weight", "out_proj.bias"], 8),
        }
        separate, reasons = fan_ins(nn.MultiheadAttention(8, 2, kdim=5, vdim=3, add_bias_kv=True))
        assert (separate["q_proj_weight"], separate["k_proj_weight"]) == (8, 5)
        assert separate["v_proj_weight"] == 3 and set(reasons) == {"bias_k", "bias_v"}

    def test_layers_without_inputs_are_left_alone_with_the_reason(self) -> None:
        model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.PReLU())
        for parameter in model.parameters():
            parameter.data.fill_(9.0)
        outcome, _ = kk.torch.bound_(model, kk.bound.InitScaled(2.0))
        assert outcome.left_alone == {
            "0.weight": "Embedding has no fan-in",
            "2.weight": "LayerNorm has no fan-in",
            "2.bias": "LayerNorm has no fan-in",
            "3.weight": "PReLU has no fan-in",
        }
        assert set(model[1].weight.flatten().tolist()) == {1.0} == set(model[1].bias.tolist())
        assert set(model[2].weight.tolist()) == {9.0} and outcome.share_at_bound == 1.0
        with pytest.raises(
            Unsupported, match="no selected tensor has a fan-in; got weight .LayerNorm"
        ):
            kk.torch.bound_(nn.LayerNorm(4), kk.bound.InitScaled())


class TestSpectralCap:
    """Power iteration with a vector that is kept."""

    @staticmethod
    def sigma(weight: torch.Tensor, axis: int = 0) -> float:
        matrix = weight.detach().double().movedim(axis, 0).flatten(1)
        return float(torch.linalg.svdvals(matrix)[0])

    @pytest.mark.parametrize(
        "layer",
        [
            nn.Linear(300, 200),
            nn.Linear(3, 400),
            nn.Conv2d(16, 32, 3),
            nn.ConvTranspose1d(6, 20, 5),
            nn.Embedding(100, 12),
        ],
        ids=str,
    )
    def test_the_first_step_has_converged(self, layer: nn.Module) -> None:
        axis = 1 if isinstance(layer, nn.ConvTranspose1d) else 0
        weight: Any = layer.weight
        before = self.sigma(weight, axis)
        outcome, _ = kk.torch.bound_(layer, kk.bound.SpectralCap(0.25), only="weight")
        assert outcome.pre == pytest.approx(before, rel=1e-4)
        assert self.sigma(weight, axis) == pytest.approx(0.25, rel=1e-4)
        assert outcome.share_at_bound == 1.0

    def test_kept_vectors_follow_weights_that_move(self) -> None:
        torch.manual_seed(0)
        layer, state, worst = nn.Linear(96, 64), None, 0.0
        for _ in range(60):
            layer.weight.data.add_(torch.randn_like(layer.weight), alpha=2e-3)
            _, state = kk.torch.bound_(layer, kk.bound.SpectralCap(1.0), state)
            worst = max(worst, self.sigma(layer.weight))
        assert self.sigma(layer.weight) > 0.999 and worst < 1.001

    def test_a_direction_that_breaks_out_is_caught_at_once(self) -> None:
        torch.manual_seed(5)
        layer, state = nn.Linear(200, 100), None
        for step in range(6):
            push = torch.outer(torch.randn(100), torch.randn(200)) * 0.02
            layer.weight.data.add_(push if step % 2 else 0.0)
            expected = self.sigma(layer.weight)
            outcome, state = kk.torch.bound_(layer, kk.bound.SpectralCap(1.0), state)
            assert outcome.pre == pytest.approx(expected, rel=1e-3)

    def test_small_weights_keep_their_bits_and_biases_are_left_alone(self) -> None:
        layer = nn.Linear(8, 8)
        before = layer.weight.clone()
        outcome, _ = kk.torch.bound_(layer, kk.bound.SpectralCap(99.0))
        assert torch.equal(layer.weight, before) and outcome.share_at_bound == 0.0
        assert outcome.left_alone == {"bias": "a bias"}

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_halves_are_measured_in_single(self, dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        layer = nn.Linear(40, 30, dtype=dtype)
        state = None
        for _ in range(3):
            expected = self.sigma(layer.weight)
            outcome, state = kk.torch.bound_(layer, kk.bound.SpectralCap(0.5), state)
            assert outcome.pre == pytest.approx(expected, rel=1e-4)
        assert self.sigma(layer.weight) == pytest.approx(0.5, rel=2 * torch.finfo(dtype).eps + 1e-5)

    @pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30, 1e37])
    def test_no_scale_over_or_underflows(self, scale: float) -> None:
        torch.manual_seed(2)
        weight = torch.randn(6, 5) * scale
        vector = None
        for _ in range(3):
            size, vector = spectral_norm(weight, 0, vector, name="w")
            assert size == pytest.approx(self.sigma(weight), rel=1e-5)

    def test_zeros_and_empty_tensors_have_none(self) -> None:
        for shape in [(3, 4), (0, 4), (3, 0)]:
            size, vector = spectral_norm(torch.zeros(shape), 0, None, name="w")
            assert size == 0.0 and vector.shape == (shape[1], min(8, *shape))
        size, vector = spectral_norm(torch.zeros(3, 4), 0, torch.ones(4, 3), name="w")
        assert size == 0.0 and torch.isfinite(vector).all()

    def test_zeros_that_grow_again_are_found_again(self) -> None:
        vector = torch.eye(4)[:, :3]
        weight = torch.zeros(3, 4)
        weight[0, 3] = 2.0  # orthogonal to all of them
        size, _ = spectral_norm(weight, 0, vector, name="w")
        assert size == pytest.approx(2.0)

    def test_the_start_depends_on_name_and_shape_alone(self) -> None:
        weight = torch.randn(50, 40)
        torch.manual_seed(0)
        one = spectral_norm(weight, 0, None, name="w")
        torch.manual_seed(1)
        other = spectral_norm(weight, 0, None, name="w")
        assert one[0] == other[0] and torch.equal(one[1], other[1])

    def test_the_state_is_never_written_to_and_resumes_bit_for_bit(self) -> None:
        def run(stop: int | None) -> list[torch.Tensor]:
            generator = torch.Generator().manual_seed(3)
            layer, state, rows = nn.Linear(24, 16), None, []
            layer.weight.data.normal_(generator=generator)
            for step in range(8):
                noise = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.data.add_(noise, alpha=0.05)
                _, state = kk.torch.bound_(layer, kk.bound.SpectralCap(2.0), state)
                rows.append(layer.weight.detach().clone())
                if step == stop:
                    file = io.BytesIO()
                    torch.save(state, file)
                    file.seek(0)
                    state = torch.load(file, weights_only=True)
            return rows

        plain = run(None)
        for stop in (0, 3, 6):
            assert all(map(torch.equal, run(stop), plain))

    def test_a_state_of_something_else_is_refused(self) -> None:
        layer, rule = nn.Linear(4, 3), kk.bound.SpectralCap(1.0)
        _, state = kk.torch.bound_(layer, rule)
        with pytest.raises(
            InvalidArgument, match="vectors: weight: these vectors are of another ten"
        ):
            kk.torch.bound_(nn.Linear(5, 3), rule, state)
        for broken in [None, {"weight": [1.0]}, {"weight": torch.ones(4, 3, dtype=torch.int64)}]:
            with pytest.raises(InvalidArgument, match="SpectralCap: this state has no vectors"):
                kk.torch.bound_(layer, rule, {**state, "vectors": broken})
        with pytest.raises(InvalidArgument, match="this state belongs to another rule"):
            kk.torch.bound_(layer, kk.bound.Clamp(1.0), state)


def test_several_bounds_in_one_are_refused() -> None:
    chain = kk.clip.Chain(kk.bound.Clamp(1.0), kk.bound.NonNegative())
    with pytest.raises(
        Unsupported, match="^torch.bound_: bounds are applied one at a time; got Chain"
    ):
        kk.torch.bound_(nn.Linear(2, 2), chain)  # type: ignore[arg-type]


def test_a_tied_weight_is_bounded_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    for rule in (kk.bound.SpectralCap(0.1), kk.bound.InitScaled(0.5), kk.bound.UnitNorm()):
        outcome, _ = kk.torch.bound_(model, rule)
        assert set(outcome.names) == {"0.weight"}
