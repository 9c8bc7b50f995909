"""`kk.torch.quantize_` on every kind of tensor, and what its methods promise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import karikomi as kk  # noqa: E402
from karikomi import pack  # noqa: E402
from karikomi.errors import InvalidArgument, NonFinite, Unsupported  # noqa: E402
from karikomi.quantize import CERWU, GPTQ, AffineGrid, OctaveGrid, UniformGrid  # noqa: E402
from karikomi.quantize.code_lengths import coded_bits  # noqa: E402
from karikomi.torch.reconstruction.calibration import Regressions  # noqa: E402


class Everything(nn.Module):
    """A layer of each kind, in an order in which data can flow."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.rnn = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.squeeze = nn.Linear(12, 8)
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 4, 2, stride=2, groups=2)
        self.last = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
        self.table = nn.Parameter(torch.randn(20, 20))
        self.register_buffer("wave", torch.linspace(0, 1, 4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.squeeze(self.rnn(self.words(tokens))[0]))
        x = self.up(self.norm(self.conv(x.transpose(1, 2))).relu()) * self.wave[:, None]
        return self.last(x.mean(2)) + self.table.sum()


def everything() -> Everything:
    torch.manual_seed(0)
    return Everything().eval()


def tokens(count: int = 4) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, 11, (8, 6), generator=random) for _ in range(count)]


def mapped(seed: int = 0, features: int = 12) -> list[torch.Tensor]:
    """Return batches of inputs that are strongly correlated."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, 3, generator=random)
    return [
        torch.randn(64, 3, generator=random) @ mix.T
        + 0.1 * torch.randn(64, features, generator=random)
        for _ in range(4)
    ]


def off(module: nn.Module, dense: nn.Module, data: list[torch.Tensor]) -> float:
    """Return the squared error of the outputs."""
    with torch.no_grad():
        return sum(float((module(x) - dense(x)).square().sum()) for x in data)


@pytest.mark.parametrize(
    "given",
    [
        {"bits": 8},
        {"entries": 16},
        {"rate": 3.0},
        {"bits": 4, "method": "gptq", "data": tokens()},
        {"rate": 3.0, "data": tokens()},
        {"rate": 3.0, "method": "cerwu", "data": tokens()},
    ],
    ids=lambda given: " ".join(map(str, given)),
)
def test_every_tensor_is_quantized_by_default(tmp_path: Path, given: dict[str, Any]) -> None:
    model = everything()
    state = {n: p for n, p in model.state_dict().items() if p.is_floating_point()}
    coded = kk.torch.quantize_(model, progress=False, **given)
    assert set(coded) == set(state) - {"wave"}
    assert set(coded.left_alone) == {"wave", "norm.num_batches_tracked"}
    for name, tensor in coded.items():
        assert torch.equal(model.state_dict()[name], torch.from_numpy(tensor.decode())), name
    path = kk.save(model, tmp_path / "all.karikomi")
    again = kk.load(path, into=everything())
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in model.state_dict().items())
    assert kk.save(again, tmp_path / "again").read_bytes() == path.read_bytes()


def test_units_and_grids_of_each_kind_of_tensor() -> None:
    model = everything()
    coded = kk.torch.quantize_(model, bits=8)
    rows = {"words.weight": 11, "rnn.weight_hh_l0": 24, "mix.self_attn.in_proj_weight": 24}
    for name, count in rows.items():
        assert coded[name].grid.axis == 0 and coded[name].grid.scale.size == count
    assert coded["up.weight"].grid.axis == 1 and coded["up.weight"].grid.scale.size == 4
    computed = coded["last.parametrizations.weight.original1"].grid
    assert computed.axis == 0 and computed.scale.size == 3
    assert coded["table"].grid.axis is None and coded["table"].grid.bits == 8
    for name in ("rnn.bias_ih_l0", "norm.running_mean", "mix.norm1.weight", "last.bias"):
        assert coded[name].grid.bits == 16 and coded[name].grid.axis is None
    assert isinstance(coded["norm.running_var"].grid, OctaveGrid)


def test_per_channel_int8_is_the_largest_weight_over_127() -> None:
    layer = nn.Linear(5, 3)
    with torch.no_grad():
        layer.weight[1] *= 1e-30
        layer.weight[2, 0], layer.weight[2, 1:] = 127.0, torch.tensor([0.5, 1.5, 2.5, -3.5])
    weight = layer.weight.detach().numpy().copy()
    coded = kk.torch.quantize_(layer, bits=8)["weight"]
    scale = (np.abs(weight).max(1).astype(np.float64) / 127).astype(np.float32)
    assert np.array_equal(coded.grid.scale, scale)
    assert np.array_equal(coded.codes, np.rint(weight / scale[:, None].astype(np.float64)))
    assert coded.codes[2].tolist() == [127, 0, 2, 2, -4] and np.abs(coded.codes[1]).max() == 127


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_are_rounded_in_their_own(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    data = [batch.to(dtype) for batch in mapped()]
    coded = kk.torch.quantize_(model, rate=3.0, data=data, progress=False)
    for name, parameter in model.named_parameters():
        assert parameter.dtype is dtype
        assert torch.equal(parameter, torch.from_numpy(coded[name].decode()).to(dtype))


@pytest.mark.parametrize("method", ["gptq", "cerwu", "adaround"])
def test_compensation_leaves_less_error_than_the_nearest_values(method: str) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    nearest, compensated = copy.deepcopy(dense), copy.deepcopy(dense)
    kk.torch.quantize_(nearest, bits=3)
    kk.torch.quantize_(compensated, bits=3, method=method, data=mapped(), progress=False)
    unseen = mapped()[2:]
    share = 0.9 if method == "adaround" else 0.5
    assert off(compensated, dense, unseen) < share * off(nearest, dense, unseen)


@pytest.mark.parametrize("given", [{}, {"data": mapped()}, {"method": "cerwu", "data": mapped()}])
def test_a_rate_is_met(given: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(12, 200), nn.ReLU(), nn.Linear(200, 40)).eval()
    for rate in (2.0, 4.0):
        coded = kk.torch.quantize_(copy.deepcopy(model), rate=rate, progress=False, **given)
        bits = sum(coded_bits(tensor.codes) for tensor in coded.values())
        assert bits / sum(tensor.codes.size for tensor in coded.values()) == pytest.approx(
            rate, rel=0.03
        )
        steps = {tensor.grid.scale.size for name, tensor in coded.items() if "weight" in name}
        assert steps == {1}


def test_steps_follow_the_curvature() -> None:
    """The second layer's outputs are shrunk to a hundredth, so its errors count for less."""

    class Shrunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 20), nn.Linear(12, 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) + 0.01 * self.second(x)

    torch.manual_seed(0)
    coded = kk.torch.quantize_(Shrunk(), rate=4.0, method="uniform", data=mapped(), progress=False)
    steps = [float(coded[f"{name}.weight"].grid.scale[0]) for name in ("first", "second")]
    assert steps[1] / steps[0] == pytest.approx(100.0, rel=0.05)


@pytest.mark.parametrize("method", ["uniform", "kmeans", "gptq", "cerwu", "adaround"])
def test_pruned_weights_stay_exact_zeros(method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    masks = kk.torch.prune_(model, sparsity=0.6)
    size: dict[str, Any] = {"entries": 8} if method == "kmeans" else {"bits": 4}
    data = None if method in ("uniform", "kmeans") else mapped()
    kk.torch.quantize_(model, method=method, data=data, progress=False, **size)
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any(), name


def test_tied_weights_are_rounded_once_and_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).eval()
    model[2].weight = model[0].weight
    coded = kk.torch.quantize_(model, bits=4, method="gptq", data=mapped(), progress=False)
    assert model[2].weight is model[0].weight and "2.weight" not in coded


def test_an_embedding_that_is_the_last_layer_too_is_not_compensated() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(x))

    model = Language()
    nearest = kk.torch.quantize_(copy.deepcopy(model), bits=4)
    coded = kk.torch.quantize_(model, bits=4, method="gptq", data=tokens(), progress=False)
    assert coded.notes == {"words.weight": "nearest values: read by embedding too"}
    assert np.array_equal(coded["words.weight"].codes, nearest["words.weight"].codes)


def test_little_data_is_noted_by_layer() -> None:
    model = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 4)).eval()
    coded = kk.torch.quantize_(
        model, bits=4, method="gptq", data=[mapped()[0][:20]], progress=False
    )
    assert coded.notes == {"2.weight": "20 rows of 30 inputs were seen: give more data"}


def test_a_mean_width_gives_more_bits_where_errors_count() -> None:
    class Shrunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 20), nn.Linear(12, 20)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x) + 0.01 * self.second(x)

    torch.manual_seed(0)
    dense = Shrunk().eval()
    mixed, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    coded = kk.torch.quantize_(mixed, bits=4.0, data=mapped(), progress=False)
    kk.torch.quantize_(plain, bits=4)
    assert [coded[f"{name}.weight"].grid.bits for name in ("first", "second")] == [6, 2]
    assert off(mixed, dense, mapped()) < 0.2 * off(plain, dense, mapped())


def test_groups_and_zero_points(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.ConvTranspose1d(4, 6, 3, groups=2))
    dense.insert(2, nn.Unflatten(1, (4, 4)))
    dense.eval()
    errors = []
    for given in ({}, {"group": 4}, {"group": 5, "symmetric": False}):
        model = copy.deepcopy(dense)
        with torch.no_grad():
            model[0].weight[:, :4] *= 0.1
        coded = kk.torch.quantize_(model, bits=3, only="*weight", **given)
        grid = coded["0.weight"].grid
        assert isinstance(grid, AffineGrid if given else UniformGrid)
        path = kk.save(model, tmp_path / "grids.karikomi")
        again = kk.load(path, into=copy.deepcopy(dense))
        assert all(
            torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
        )
        lost = model[0].weight[:, :4] - 0.1 * dense[0].weight[:, :4]
        errors.append(float(lost.detach().norm()))
    assert errors[1] < 0.3 * errors[0]
    grids = {entry.name: entry.quantizer for entry in pack.inspect(path).entries}
    assert grids["0.weight"].startswith("affine 3 bits")


@pytest.mark.parametrize("name", ["percentile", "mse"])
def test_a_range_that_clips_outliers_errs_less_elsewhere(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4000, 2)
    with torch.no_grad():
        layer.weight.copy_(0.1 * torch.randn(2, 4000))
        layer.weight[:, 0] = 1.0
    whole, clipped = copy.deepcopy(layer), copy.deepcopy(layer)
    kk.torch.quantize_(whole, bits=4)
    kk.torch.quantize_(clipped, bits=4, range=name)
    lost = [(item.weight - layer.weight).detach()[:, 1:] for item in (whole, clipped)]
    assert lost[1].norm() < 0.7 * lost[0].norm() and float(clipped.weight.detach()[0, 0]) < 0.9


def test_modes_and_flags_stay_and_nothing_is_left_half_done() -> None:
    model = nn.Sequential(
        nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4)
    ).train()
    model[3].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    kk.torch.quantize_(copy.deepcopy(model), rate=3.0, data=mapped(), progress=False)
    with pytest.raises(NonFinite):
        kk.torch.quantize_(
            model, bits=4, method="gptq", data=[mapped()[0] * float("nan")], progress=False
        )
    assert all(module.training for module in model.modules())
    assert not model[3].weight.requires_grad
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())


def test_calibration_without_labels_gives_the_same_bytes_each_time() -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)).eval()
    given = {"rate": 3.0, "data": mapped(), "loss": nn.functional.cross_entropy}
    found = [
        kk.torch.quantize_(copy.deepcopy(model), seed=seed, progress=False, **given)
        for seed in (0, 0, 1)
    ]
    steps = [float(coded["0.weight"].grid.scale[0]) for coded in found]
    assert steps[0] == steps[1] != steps[2]
    assert found[0]["0.weight"].codes.tobytes() == found[1]["0.weight"].codes.tobytes()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "exactly one"),
        ({"bits": 8, "rate": 2.0}, "exactly one"),
        ({"rate": 0.0}, "rate out of range"),
        ({"rate": 17}, "rate out of range"),
        ({"rate": 2.0, "group": 4}, "one step per tensor"),
        ({"rate": 2.0, "method": "kmeans"}, "takes entries"),
        ({"entries": 4, "range": "mse"}, "none of these options"),
        ({"bits": 4, "group": 0}, "group out of range"),
        ({"bits": 4, "method": "gptq"}, "needs data"),
        ({"bits": 4.5}, "needs data"),
        ({"bits": 9.5, "data": mapped()}, "mean width out of range"),
        ({"bits": 4, "method": "gptq", "data": iter(mapped())}, "yields it once"),
        ({"bits": 4, "method": GPTQ(damping=0.1), "data": mapped()[0]}, "iterable of batches"),
        ({"rate": 3.0, "data": mapped(), "loss": nn.functional.mse_loss}, "takes targets"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        kk.torch.quantize_(nn.Linear(12, 4), progress=False, **given)


@pytest.mark.parametrize("make", [lambda: GPTQ(damping=0.0), lambda: GPTQ(block=0)])
def test_bad_methods_are_refused(make: Any) -> None:
    with pytest.raises(InvalidArgument, match="out of range"):
        make()
    with pytest.raises(InvalidArgument, match="out of range"):
        CERWU(exchange=-1.0)


def test_a_rate_that_a_tiny_network_cannot_have_is_refused() -> None:
    with pytest.raises(Unsupported, match="out of reach"):
        kk.torch.quantize_(nn.Linear(2, 2), rate=0.5)


def test_compensation_is_never_worse_than_nearest_values_where_a_mask_takes_part() -> None:
    """Weights that the mask removes late in the sweep take up errors of earlier ones, and lose them."""
    worse = []
    for seed in range(6):
        torch.manual_seed(seed)
        dense = nn.Linear(24, 16, bias=False)
        mixing = torch.randn(24, 24) * 0.3 + torch.ones(24, 24) * 0.2
        data = [torch.randn(64, 24) @ mixing for _ in range(4)]
        with torch.no_grad():
            dense.weight *= torch.rand(16, 24) < 0.3
        lost = {}
        for method in ("uniform", "gptq"):
            model = copy.deepcopy(dense)
            given: Any = {"data": data} if method == "gptq" else {}
            coded = kk.torch.quantize_(model, bits=2, method=method, progress=False, **given)
            assert not model.weight[dense.weight == 0].any() and "weight" in coded
            with torch.no_grad():
                lost[method] = sum(float((model(x) - dense(x)).square().sum()) for x in data)
        worse.append(lost["gptq"] / lost["uniform"])
    assert max(worse) <= 1 + 1e-6 and min(worse) < 0.9


class Experts(nn.Module):
    """A gate sends each example to one of two experts, as it reads a layer that is quantized first."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate = nn.Linear(6, 6), nn.Linear(6, 2)
        self.experts = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        chosen, found = self.gate(x).argmax(1), x.new_zeros(len(x), 4)
        for number, expert in enumerate(self.experts):
            found[chosen == number] = expert(x[chosen == number])
        return found


def test_a_weight_that_reads_other_examples_after_rounding_is_fitted_to_those() -> None:
    torch.manual_seed(0)
    dense = Experts().eval().requires_grad_(requires_grad=False)
    data = [torch.randn(60, 6) for _ in range(3)]
    moved = copy.deepcopy(dense)
    with torch.no_grad():
        moved.gate.bias[0] += 0.5
    names = [f"experts.{number}.weight" for number in range(2)]
    weights = {name: moved.get_parameter(name) for name in names}
    sums = Regressions(moved, weights, {**dict(dense.named_parameters())}, data, where="here")
    for number, name in enumerate(names):
        found = sums.problem(name)
        with torch.no_grad():
            inputs = torch.cat(data)
            seen = moved.body(inputs)
            rows = seen[moved.gate(seen).argmax(1) == number].double()
        wanted = dense.get_parameter(name).detach().double()
        np.testing.assert_allclose(found.gram[0], (rows.T @ rows).numpy(), rtol=1e-5)
        np.testing.assert_allclose(found.cross[0], (wanted @ rows.T @ rows).numpy(), rtol=1e-4)
        assert sums.rows[name] == len(rows)
    codes = kk.torch.quantize_(moved, bits=3, method="gptq", data=data)
    assert set(names) <= set(codes)
