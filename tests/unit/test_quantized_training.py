"""Quantized training: gradients against the papers' formulas, and what a user's loop does with such a module."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import karikomi as kk
from karikomi.errors import InvalidArgument, NonFinite, UnknownName, Unsupported
from karikomi.quantize import Coded, UniformGrid
from karikomi.quantize.rate_model import fitted
from karikomi.torch.quantization import straight_through
from karikomi.torch.quantization.learned_steps import LearnedGrid
from karikomi.torch.quantization.while_training import learned_places

STEP = torch.tensor(0.3)


def small(**changes) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return nn.Sequential(*layers).to(**changes)


def steps_of_training(model, training, *, count=30, strength=0.0, rate=0.01):
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(count):
        x = torch.randn(16, 6, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :4]).square().mean() + strength * training.bits()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_gradients_are_those_of_the_paper(bits):
    """LSQ, equations 1 to 3, with Qn = Qp; the paper's formula in NumPy."""
    limit, generator = 2 ** (bits - 1) - 1, np.random.default_rng(bits)
    weight = generator.normal(size=(5, 7)).astype(np.float32)
    upstream = generator.normal(size=(5, 7)).astype(np.float32)
    leaf, step = torch.tensor(weight, requires_grad=True), STEP.clone().requires_grad_()
    value = straight_through.rounded(leaf, step, limit=limit, share=0.25)
    value.backward(torch.from_numpy(upstream))
    ratio = weight / np.float32(0.3)
    codes = np.rint(np.clip(ratio, -limit, limit))
    inside = np.abs(ratio) <= limit
    slope = np.where(inside, codes - ratio, np.sign(ratio) * limit)
    assert np.array_equal(value.detach().numpy(), codes * np.float32(0.3))
    assert np.array_equal(leaf.grad.numpy(), upstream * inside)
    assert step.grad.item() == pytest.approx(0.25 * (upstream * slope).sum(), rel=1e-5)


def test_bits_have_the_gradient_of_the_rate_model():
    weight = torch.randn(40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaf, step = weight.requires_grad_(), STEP.double().requires_grad_()
    total = straight_through.bits(leaf, step, limit=7)
    (3.0 * total).backward()
    ratio = weight.detach().numpy() / step.item()
    codes = np.minimum(np.abs(np.rint(ratio)), 7)
    facts = codes.size, np.count_nonzero(codes), codes.sum()
    slopes = fitted(*facts).slope(ratio)
    assert total.item() == pytest.approx(fitted(*facts).total(*facts), rel=1e-12)
    assert np.allclose(leaf.grad.numpy(), 3.0 * slopes / step.item(), rtol=1e-12)
    assert step.grad.item() == pytest.approx(3.0 * -(slopes * ratio).sum() / step.item())


def test_the_step_starts_as_in_the_paper():
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    grid = LearnedGrid(weight, 4, kk.quantize.OutputUnits())
    assert grid.initial.item() == pytest.approx(2 * weight.abs().mean().item() / 7**0.5)
    assert grid.share == pytest.approx((40 * 7) ** -0.5)
    per_unit = LearnedGrid(weight, 4, kk.quantize.OutputUnits(0))
    assert torch.allclose(per_unit.initial, 2 * weight.abs().mean(1) / 7**0.5)
    assert per_unit.share == pytest.approx((5 * 7) ** -0.5)


def test_a_step_of_sgd_moves_the_grid_as_its_own_parameter_would():
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    grid, plain = LearnedGrid(weight, 3, kk.quantize.OutputUnits()), None
    plain = grid.initial.clone().requires_grad_()
    grid(weight).square().sum().backward()
    value = straight_through.rounded(weight, plain, limit=3, share=grid.share)
    value.square().sum().backward()
    rate = 1e-6
    moved = grid.initial * torch.exp(grid.offset.detach() - rate * grid.offset.grad)
    assert plain.grad.item() != 0
    change = (moved - grid.initial).double().item()
    assert change == pytest.approx(-rate * plain.grad.item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("per", ["tensor", "unit"])
def test_finishing_keeps_what_the_module_computes_and_saves_codes(dtype, per, tmp_path):
    model = small(dtype=dtype)
    x = torch.randn(3, 6, dtype=dtype)
    training = kk.torch.quantized_training(model, bits=3, per=per)
    before, parameters = model(x).detach(), [p for n, p in model.named_parameters() if "orig" in n]
    coded = training.finish_()
    assert torch.equal(model(x), before)
    assert {id(item) for item in model.parameters()} == {id(item) for item in parameters}
    assert sorted(coded) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    scales = {name: tensor.grid.numbers.size for name, tensor in coded.items()}
    assert scales["0.weight"] == (8 if per == "unit" else 1) and scales["0.bias"] == 1
    assert [tensor.grid.bits for tensor in coded.values()] == [3, 8, 3, 8]
    path = kk.save(model, tmp_path / "a.karikomi")
    assert all("uniform" in entry.quantizer for entry in kk.pack.inspect(path).entries)
    stored = kk.load(path, into=small(dtype=dtype))
    assert torch.equal(stored(x), before)


def test_training_lowers_the_loss_through_the_rounding_and_learns_steps():
    model = small()
    training = kk.torch.quantized_training(model, bits=4)
    first = steps_of_training(model, training, count=1)
    assert steps_of_training(model, training, count=100) < 0.5 * first
    assert all(step.detach().abs().max().item() > 0 for step in training.steps())


def test_the_penalty_makes_the_codes_smaller_by_making_them_zero():
    sizes = {}
    for strength in (0.0, 3e-3, 3e-2):
        model = small()
        training = kk.torch.quantized_training(model, bits=4)
        steps_of_training(model, training, count=100, strength=strength)
        sizes[strength] = training.size()
    assert sizes[0.0].total > sizes[3e-3].total > sizes[3e-2].total
    assert sum(sizes[0.0].nonzero.values()) > sum(sizes[3e-2].nonzero.values())
    assert f"{sizes[0.0].total / 8:,.0f} bytes" in str(sizes[0.0])


def test_the_size_is_that_of_the_codes():
    model = small()
    training = kk.torch.quantized_training(model, bits=3)
    size, coded = training.size(), training.codes()
    assert size.elements == sum(item.numel() for item in small().parameters())
    assert size.nonzero == {name: int((item.codes != 0).sum()) for name, item in coded.items()}
    counts = np.unique(coded["0.weight"].codes, return_counts=True)[1]
    entropy = -(counts * np.log2(counts / counts.sum())).sum()
    assert size.bits["0.weight"] == pytest.approx(entropy)
    facts = [
        (item.codes.size, np.count_nonzero(item.codes), np.abs(item.codes.astype(int)).sum())
        for item in coded.values()
    ]
    modelled = sum(fitted(*of).total(*of) for of in facts)
    assert training.bits().item() == pytest.approx(modelled) and modelled > size.total


def test_masked_weights_stay_zero():
    model = small()
    masks = kk.torch.prune_(model, sparsity=0.5)
    training = kk.torch.quantized_training(model, bits=4, masks=masks)
    steps_of_training(model, training)
    coded = training.finish_()
    assert masks.not_zero(model) == {}
    assert all(not coded[name].codes[~mask.numpy()].any() for name, mask in masks.items())
    assert coded["0.weight"].codes.any()


def test_zeros_are_held_from_when_it_is_asked():
    model = small()
    training = kk.torch.quantized_training(model, bits=3)
    before = {name: item.codes == 0 for name, item in training.codes().items()}
    training.hold_zeros_()
    steps_of_training(model, training, rate=0.05)
    after = training.codes()
    assert any(mask.any() for mask in before.values())
    assert all(not after[name].codes[mask].any() for name, mask in before.items())


@pytest.mark.parametrize("held", [False, True])
def test_a_checkpoint_continues_as_if_it_had_not_stopped(held):
    model = small()
    training = kk.torch.quantized_training(model, bits=4)
    if held:
        training.hold_zeros_()
    steps_of_training(model, training)
    state = copy.deepcopy(model.state_dict())
    other = small()
    again = kk.torch.quantized_training(other, bits=4)
    other.load_state_dict(state, assign=held)
    results = [steps_of_training(*pair) for pair in ((model, training), (other, again))]
    assert results[0] == results[1]
    first, second = training.codes(), again.codes()
    assert all(np.array_equal(first[name].codes, second[name].codes) for name in first)


def test_a_deep_copy_and_an_average_have_codes_of_their_own():
    model = small()
    training = kk.torch.quantized_training(model, bits=4)
    average = torch.optim.swa_utils.AveragedModel(model)
    copied = copy.deepcopy(model)
    before = training.codes()["0.weight"].codes
    steps_of_training(model, training, rate=0.05)
    of_copy = training.on(copied).codes()["0.weight"].codes
    assert np.array_equal(of_copy, before)
    assert not np.array_equal(training.codes()["0.weight"].codes, before)
    average.update_parameters(model)
    assert sorted(training.on(average).finish_()) == sorted(training.codes())


def test_tied_weights_have_one_grid():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 5), nn.Linear(5, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x))

    model = Tied()
    training = kk.torch.quantized_training(model, bits=3)
    assert len(training.steps()) == 1 and list(training.codes()) == ["embed.weight"]
    model(torch.tensor([1])).sum().backward()
    coded = training.finish_()
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, torch.from_numpy(coded["embed.weight"].decode()))


@pytest.mark.parametrize("layer", [nn.LSTM(4, 3), nn.GRU(4, 3, bidirectional=True), nn.RNN(4, 3)])
def test_recurrent_layers_use_the_rounded_weights_and_can_be_copied(layer):
    layer, x = copy.deepcopy(layer), torch.randn(5, 2, 4)
    plain = layer(x)[0]
    training = kk.torch.quantized_training(layer, bits=2)
    rounded = layer(x)[0]
    assert not torch.equal(plain, rounded)
    assert torch.equal(copy.deepcopy(layer)(x)[0], rounded)
    rounded.sum().backward()
    assert all(item.grad is not None for item in layer.parameters())
    training.finish_()
    assert torch.equal(layer(x)[0], rounded)
    assert torch.equal(copy.deepcopy(layer)(x)[0], rounded)


def test_attention_norms_and_grouped_transposed_convolutions_take_part():
    model = nn.ModuleDict(
        {
            "attend": nn.MultiheadAttention(8, 2),
            "norm": nn.BatchNorm1d(8),
            "up": nn.ConvTranspose1d(4, 6, 3, groups=2),
        }
    )
    training = kk.torch.quantized_training(model, bits=4, per="unit")
    coded = training.codes()
    assert coded["up.weight"].grid.groups == 2 and coded["up.weight"].grid.numbers.size == 6
    assert {"attend.in_proj_weight", "norm.weight", "norm.bias"} <= coded.keys()
    error = np.abs(coded["up.weight"].decode() - model["up"].weight.detach().numpy())
    assert error.max() == 0.0


def test_what_stays_is_named_with_the_reason():
    model = nn.Sequential(
        spectral_norm(nn.Linear(3, 3)), weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3)
    )
    model.register_parameter("none", nn.Parameter(torch.zeros(0)))
    training = kk.torch.quantized_training(model, exclude="2.bias")
    assert training.left_alone["none"] == "it is empty"
    assert training.left_alone["2.bias"] == "not selected"
    assert "computed from it" in training.left_alone["0.parametrizations.weight.original"]
    assert sorted(training.codes()) == ["0.bias", "1.bias", "2.weight"]
    assert "2.bias" in training.codes().left_alone


def test_frozen_parameters_are_rounded_and_not_moved():
    model = small()
    model[0].weight.requires_grad_(False)
    training = kk.torch.quantized_training(model, bits=4)
    latent = model[0].parametrizations.weight.original.clone()
    steps_of_training(model, training)
    assert torch.equal(model[0].parametrizations.weight.original, latent)
    assert not torch.equal(model[0].weight, latent)


def test_a_parameter_without_axes_takes_part():
    model = small()
    model.register_parameter("scale", nn.Parameter(torch.tensor(-0.7)))
    coded = kk.torch.quantized_training(model).finish_()
    assert coded["scale"].shape == () and model.scale.item() == coded["scale"].decode()
    assert model.scale.item() == pytest.approx(-0.7, abs=0.07)


def test_a_bias_of_zeros_can_be_trained():
    model = small()
    nn.init.zeros_(model[2].bias)
    training = kk.torch.quantized_training(model, bits=4)
    steps_of_training(model, training, rate=0.05)
    assert training.codes()["2.bias"].codes.any()


@pytest.mark.parametrize(
    "arguments",
    [{"bits": 1}, {"bits": 9}, {"vectors": 1}, {"bits": 3.0}, {"per": "row"}],
)
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(InvalidArgument):
        kk.torch.quantized_training(small(), **arguments)


def test_masks_that_do_not_fit_are_refused():
    mask = torch.ones(8, 6, dtype=torch.bool)
    for masks, error in (
        ({"0.weigth": mask}, UnknownName),
        ({"0.weight": mask[:1]}, InvalidArgument),
        ({"0.weight": mask.float()}, InvalidArgument),
    ):
        with pytest.raises(error):
            kk.torch.quantized_training(small(), masks=masks)


def test_nothing_to_quantize_and_values_that_are_not_finite():
    with pytest.raises(Unsupported):
        kk.torch.quantized_training(nn.ReLU())
    model = small()
    training = kk.torch.quantized_training(model)
    with pytest.raises(Unsupported):
        kk.torch.quantized_training(model)
    with torch.no_grad():
        model[2].parametrizations.weight.original[0, 0] = torch.nan
    with pytest.raises(NonFinite, match=r"2\.weight"):
        training.codes()
    broken = small()
    with torch.no_grad():
        broken[2].weight[0, 0] = torch.inf
    with pytest.raises(NonFinite, match=r"2\.weight"):
        kk.torch.quantized_training(broken)
    assert not hasattr(broken[0], "parametrizations")
    with pytest.raises(Unsupported):
        kk.torch.quantized_training(nn.Linear(2, 2, device="meta"))


def test_a_finished_module_is_in_training_no_more():
    model = small()
    training = kk.torch.quantized_training(model)
    training.finish_()
    for use in (training.bits, training.size, training.codes, training.finish_):
        with pytest.raises(InvalidArgument):
            use()
    with pytest.raises(InvalidArgument):
        training.on(model)
    assert not hasattr(model[0], "parametrizations")


def test_clipping_of_attach_works_on_top():
    model = small()
    training = kk.torch.quantized_training(model, bits=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = kk.torch.attach(optimizer, model, clip=kk.clip.ByGlobalNorm(1e-3))
    (model(torch.ones(1, 6)).sum() + training.bits()).backward()
    optimizer.step()
    assert handle.last.action == "clipped"


def test_the_end_of_a_copy_is_not_that_of_the_original():
    model = nn.Sequential(nn.Linear(3, 2))
    training = kk.torch.quantized_training(model)
    copied = copy.deepcopy(model)
    codes = training.on(copied).finish_()
    assert type(copied[0]) is nn.Linear and type(model[0]) is not nn.Linear
    assert torch.equal(model(torch.ones(1, 3)), copied(torch.ones(1, 3)))
    assert sorted(training.finish_()) == sorted(codes) and type(model[0]) is nn.Linear


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm])
def test_a_copy_of_a_parametrized_module_is_trained_without_touching_the_original(wrap):
    """Copies share the class that ``parametrize`` makes, with the properties that it has for each tensor."""
    module = nn.Sequential(wrap(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2)).eval()
    inputs = torch.randn(3, 4)
    before = module(inputs)
    other = copy.deepcopy(module)
    training = kk.torch.quantized_training(other)
    assert torch.equal(module(inputs), before) and module[0].bias.shape == (6,)
    places = {name: chain for name, chain, _ in learned_places(other)}
    assert places["0.bias"] == "0.parametrizations.bias" and "0.weight" not in places
    training.finish_()
    assert torch.equal(module(inputs), before) and other[0].bias.shape == (6,)
    assert torch.isfinite(other(inputs)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per", ["tensor", "unit"])
def test_training_begins_at_codes_that_are_given(per: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(9, 6).to(dtype)
    before = model.weight.detach().float().clone()
    scale = np.linspace(0.02, 0.05, 6, dtype=np.float32) if per == "unit" else np.float32([0.03])
    steps = torch.from_numpy(scale.reshape(-1, 1))
    # Not the nearest codes, as second-order rounding gives them.
    codes = (before / steps).round().clamp(-62, 62) + torch.randint(-1, 2, before.shape)
    grid = UniformGrid(scale, 0 if per == "unit" else None, 7)
    coded = Coded(codes.numpy().astype(np.int8), grid)
    training = kk.torch.quantized_training(model, bits=7, per=per, codes={"weight": coded})
    found = training.codes()["weight"]
    assert np.array_equal(found.codes, coded.codes)
    assert np.allclose(found.grid.numbers, scale)
    latent = model.parametrizations.weight.original.detach().float()
    wanted = before.clamp((codes - 0.45) * steps, (codes + 0.45) * steps)
    assert torch.allclose(latent, wanted, atol=1e-6 if dtype == torch.float32 else 0.02)
    model(torch.ones(2, 9, dtype=dtype)).sum().backward()
    assert all(item.grad is not None for item in model.parameters())


@pytest.mark.parametrize(
    ("coded", "said"),
    [
        (Coded(np.int8([[1, 2]]), UniformGrid(np.float32([1]), None, 4)), "another shape"),
        (Coded(np.int8([[1, 9]] * 3), UniformGrid(np.float32([1]), None, 8)), "beyond"),
        (Coded(np.int8([[1, 2]] * 3), UniformGrid(np.float32([1, 1]), 1, 4)), "another grid"),
    ],
)
def test_codes_that_training_cannot_begin_at_change_nothing(coded: Coded, said: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(2, 3))
    before = copy.deepcopy(model.state_dict())
    good = Coded(np.int8([[1, 2]] * 3), UniformGrid(np.float32([1]), None, 4))
    with pytest.raises(InvalidArgument, match=said):
        kk.torch.quantized_training(model, bits=4, codes={"0.weight": good, "1.weight": coded})
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], a) for n, a in before.items())


def test_training_begins_at_all_that_quantize_returns() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)
    model = nn.Sequential(*layers).eval()
    images = torch.randn(4, 3, 6, 6)
    codes = {**kk.torch.quantize_(copy.deepcopy(model), rate=2.0, data=[images], progress=False)}
    assert "1.running_var" in codes
    training = kk.torch.quantized_training(model, bits=8, codes=codes)
    assert np.array_equal(training.codes()["0.weight"].codes, codes["0.weight"].codes)
    with pytest.raises(UnknownName, match="4.weight"):
        kk.torch.quantized_training(nn.Linear(2, 2), codes={"4.weight": codes["3.weight"]})
